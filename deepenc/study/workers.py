"""Who fights the trials: a queue that alone writes to the study, and this process or others that fight."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepenc.arena.record import Record
from deepenc.processes.child import Handler, Tell, prepare
from deepenc.processes.pool import Jobs
from deepenc.seeds import Roots
from deepenc.study.owners import alive
from deepenc.study.search import Search
from deepenc.study.space import identity, points
from deepenc.study.storage import storing
from deepenc.study.trials import Evaluator, Result

if TYPE_CHECKING:
    from optuna import Study, Trial

Job = tuple["Trial", dict[str, Any]]
"""A trial, and the values to be tried."""

log = logging.getLogger(__name__)


class Progress:
    """Is told what a search does. This one is silent."""

    def planned(self, total: int, finished: int) -> None:
        """Once: trials in all, and those that earlier commands finished."""

    def finished(self, number: int, values: Mapping[str, Any], result: Result) -> None:
        """A trial of these values has ended and is stored."""


class TrialQueue(Jobs[Job]):
    """Hands out trials and stores what comes of them; only this side writes to the study.

    Args:
        search: What is searched.
        study: Where trials are stored.
        where: The study is kept, for messages.
        owner: Name of this command, where others may work on the study at the same time.
        progress: Is told how it goes.
        references: Of the search; workers are given them.
    """

    def __init__(
        self,
        search: Search,
        study: Study,
        where: str,
        owner: str | None,
        progress: Progress,
        references: tuple[Record, ...] = (),
    ) -> None:
        self.search, self.study, self._references = search, study, references
        self._where, self._owner, self._progress = where, owner, progress
        self._points = points(search)
        self.fought = 0
        self._warned = False
        with storing(where):
            self._orphans = self._recover()
            done = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
        progress.planned(search.trials, done)

    def _recover(self) -> list[Trial]:
        """Trials that were running when their command died: they go on, under their numbers."""
        from optuna import Trial
        from optuna.trial import TrialState

        found = []
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            theirs = frozen.user_attrs.get("owner")
            if self._owner is None or theirs is None or not alive(theirs):
                # Optuna has no public way back from a stored trial to one that can be gone on with.
                found.append(self._owned(Trial(self.study, frozen._trial_id)))
        return found

    def _owned(self, trial: Trial) -> Trial:
        if self._owner is not None:
            trial.set_user_attr("owner", self._owner)
        return trial

    def left(self) -> bool:
        """See `Jobs.left`."""
        with storing(self._where):
            return bool(self._orphans) or not self._exhausted()

    def next(self, slot: int = 0) -> Job | None:
        """A trial to run, with its values; None where there is no more to do.

        Raises:
            StoreError: The study cannot be read or written; so for the other methods.
        """
        with storing(self._where):
            if self._orphans:
                trial = self._orphans.pop(0)
            elif self._exhausted():
                return None
            else:
                trial = self._owned(self.study.ask())
            return trial, {axis.field: axis.suggest(trial) for axis in self.search.space}

    def _exhausted(self) -> bool:
        """Whether there are enough trials, or every defense of the space was tried."""
        from optuna.trial import TrialState

        begun = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
        if len(begun) >= self.search.trials:
            return True
        whole = [t.params for t in begun if len(t.params) == len(self.search.space)]
        if not self._points or not self._points <= {identity(self.search, params) for params in whole}:
            return False
        if not self._warned:
            log.warning("every defense of the space was tried: %d trials", len(begun))
        self._warned = True
        return True

    def message(self, job: Job) -> object:
        """See `Jobs.message`."""
        return self._references, job[1]

    def told(self, job: Job, note: Step) -> bool:
        """See `Jobs.told`."""
        return self.prune(job[0], note.step, note.value)

    def done(self, job: Job, result: Result) -> None:
        """See `Jobs.done`."""
        self.close(job[0], result)

    def lost(self, job: Job, reason: str) -> None:
        """See `Jobs.lost`."""
        self.close(job[0], Result("failed", reason=reason))

    def prune(self, trial: Trial, step: int, value: float) -> bool:
        """Take note of how a trial goes; says whether to give it up."""
        with storing(self._where):
            stored = self.study.get_trials(deepcopy=False)[trial.number]
            if step not in stored.intermediate_values:
                trial.report(value, step)  # a trial that goes on after a crash has reported its first steps
            return self.search.pruning and trial.should_prune()

    def close(self, trial: Trial, result: Result) -> None:
        """Store how a trial ended."""
        from optuna.trial import TrialState

        with storing(self._where):
            trial.set_user_attr("records", [r.model_dump(mode="json") for r in result.records])
            trial.set_user_attr("responses", list(result.responses))
            trial.set_user_attr("reason", result.reason)
            if result.state == "complete":
                self.study.tell(trial, result.values)
            else:
                # Not what Optuna would make of it: a pruned trial's last value is none of the objective.
                state = TrialState.PRUNED if result.state == "pruned" else TrialState.FAIL
                self.study.tell(trial, state=state)
            values = trial.params
        self.fought += 1
        self._progress.finished(trial.number, values, result)


@dataclass(frozen=True)
class Step:
    """How a trial goes; the worker waits to be told whether to give up."""

    step: int
    value: float


def run_inline(queue: TrialQueue, evaluator: Evaluator) -> None:
    """Run all trials in this process."""
    while (job := queue.next()) is not None:
        trial, values = job
        result = evaluator.run(values, lambda step, value, trial=trial: queue.prune(trial, step, value))  # type: ignore[misc]
        queue.close(trial, result)


@dataclass(frozen=True)
class Setup:
    """Makes a process ready to run trials; it never touches the study, so that nothing it does can spoil it.

    Attributes:
        search: As plain data: the user's plugins must be loaded before they can be named.
        cache: Folder of the victims.
        root: Root of the tuning keys and seeds.
        plugin_files: To be loaded first.
    """

    search: dict[str, Any]
    cache: Path
    root: Roots
    plugin_files: tuple[Path, ...]

    def __call__(self) -> Handler:
        """Called once in each process; gives what runs a trial, by the references and its values."""
        prepare(self.plugin_files)
        evaluator = Evaluator(Search.model_validate(self.search), self.cache, self.root)

        def handle(job: tuple[tuple[Record, ...], Mapping[str, Any]], tell: Tell) -> Result:
            evaluator.references, values = job
            return evaluator.run(values, lambda step, value: bool(tell(Step(step, value))))

        return handle
