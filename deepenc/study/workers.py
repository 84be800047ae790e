"""Who fights the trials: a queue that alone writes to the study, and this process or others that fight."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepenc.arena.record import Record
from deepenc.arena.run.leases import alive
from deepenc.processes import Crew, Worker, ready, settle
from deepenc.seeds import Roots
from deepenc.study.sampling import identity, points
from deepenc.study.search import Search
from deepenc.study.storage import storing
from deepenc.study.trials import Evaluator, Result

if TYPE_CHECKING:
    from optuna import Study, Trial

    Job = tuple[Trial, dict[str, Any]]

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""Workers that a trial may cost before it counts as failed."""


class Progress(Protocol):
    """Is told what a search does."""

    def planned(self, total: int, finished: int) -> None:
        """Once: trials in all, and those that earlier commands finished."""

    def finished(self, number: int, values: Mapping[str, Any], result: Result) -> None:
        """A trial of these values has ended and is stored."""


class TrialQueue:
    """Hands out trials and stores what comes of them; only this side writes to the study.

    Args:
        search: What is searched.
        study: Where trials are stored.
        where: The study is kept, for messages.
        owner: Name of this command, where others may work on the study at the same time.
        progress: Is told how it goes.
    """

    def __init__(
        self, search: Search, study: Study, where: str, owner: str | None, progress: Progress
    ) -> None:
        self.search, self.study = search, study
        self._where, self._owner, self._progress = where, owner, progress
        self._points = points(search)
        self.fought = 0
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

    def next(self) -> Job | None:
        """A trial to fight, with its values; None where there is no more to do.

        Raises:
            StoreError: The study cannot be read or written; so for the other methods.
        """
        from optuna.trial import TrialState

        with storing(self._where):
            if self._orphans:
                trial = self._orphans.pop(0)
            else:
                begun = [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
                if len(begun) >= self.search.trials:
                    return None
                whole = [t.params for t in begun if len(t.params) == len(self.search.space)]
                if self._points and self._points <= {identity(self.search, params) for params in whole}:
                    log.warning("every defense of the space was tried: %d trials", len(begun))
                    return None
                trial = self._owned(self.study.ask())
            return trial, {axis.field: axis.suggest(trial) for axis in self.search.space}

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
class WorkerConfig:
    """All that a worker must know, once.

    Attributes:
        search: As plain data: the user's plugins must be loaded before they can be named.
        cache: Folder of the victims.
        root: Root of the tuning keys and seeds.
        plugin_files: To be loaded first.
        threads: For torch.
    """

    search: dict[str, Any]
    cache: Path
    root: Roots
    plugin_files: tuple[Path, ...]
    threads: int


@dataclass(frozen=True)
class Step:
    """How a trial goes; the worker waits to be told whether to give up."""

    step: int
    value: float


def run_inline(queue: TrialQueue, evaluator: Evaluator) -> int:
    """Fight all trials in this process; says how many."""
    while (job := queue.next()) is not None:
        trial, values = job
        result = evaluator.run(values, lambda step, value, trial=trial: queue.prune(trial, step, value))  # type: ignore[misc]
        queue.close(trial, result)
    return queue.fought


def run_in_workers(queue: TrialQueue, pool: Crew[Worker[Job]], references: tuple[Record, ...]) -> int:
    """Fight all trials in processes; a trial whose worker dies is tried once more. Says how many."""
    deaths: dict[int, int] = {}

    def give(worker: Worker[Job], job: Job | None) -> None:
        worker.task = job
        if job is not None:
            worker.send(job[1])

    for worker in pool.workers:
        worker.send(references)
        give(worker, queue.next())
    while any(worker.task is not None for worker in pool.workers):
        for worker in ready(pool.workers):
            job, said = worker.task, worker.receive()
            assert job is not None
            trial = job[0]
            if isinstance(said, Step):
                worker.send(queue.prune(trial, said.step, said.value))
                continue
            if said is not None:
                queue.close(trial, said)
                give(worker, queue.next())
                continue
            how = worker.death()
            fresh = pool.replace(worker)
            fresh.send(references)
            deaths[trial.number] = deaths.get(trial.number, 0) + 1
            if deaths[trial.number] >= ATTEMPTS:
                reason = f"the worker process died {deaths[trial.number]} times ({how})"
                queue.close(trial, Result("failed", reason=reason))
                job = queue.next()
            give(fresh, job)
    return queue.fought


def serve(connection: Connection, config: WorkerConfig) -> None:
    """Body of a worker process: takes the references, then the values of trials until the connection ends.

    It never touches the study, so that nothing it does can spoil it.

    Args:
        connection: To the coordinator.
        config: What it must know.
    """
    settle(config.threads, config.plugin_files)
    evaluator = Evaluator(Search.model_validate(config.search), config.cache, config.root)

    def report(step: int, value: float) -> bool:
        connection.send(Step(step, value))
        return bool(connection.recv())

    try:
        evaluator.references = connection.recv()
        while True:
            values: Mapping[str, Any] = connection.recv()
            connection.send(evaluator.run(values, report))
    except (EOFError, OSError):
        return
