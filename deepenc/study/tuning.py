"""Tune a defense: search on tuning data and tuning keys, then measure the winner on fresh ones."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deepenc.arena.record import Record
from deepenc.arena.run import matrix
from deepenc.arena.run.leases import alive, new_owner, retire
from deepenc.arena.run.pool import Progress as Watcher
from deepenc.arena.run.pool import Silent
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, StoreError
from deepenc.plugins import load_file
from deepenc.processes import Crew, Worker, ready, threads
from deepenc.seeds import Roots, derive, number, random_root
from deepenc.study.outcome import Finalist, chosen, defense_of, final_experiment, finalist
from deepenc.study.sampling import identity, points, sampler
from deepenc.study.search import CHANGEABLE, RISING, Search
from deepenc.study.trials import Evaluator, Result
from deepenc.study.workers import Brief, Step, serve

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    _Job = tuple[Trial, dict[str, Any]]

log = logging.getLogger(__name__)

JOURNAL, LOCK, FRESH = "study.journal", "study.lock", "fresh"
ATTEMPTS = 2
"""Workers that a trial may cost before it counts as failed."""


class Progress(Protocol):
    """Is told what a search does."""

    def begun(self, trials: int, finished: int) -> None:
        """Once: trials in all, and those that earlier commands finished."""

    def finished(self, number: int, result: Result) -> None:
        """A trial has ended and is stored."""


class Quiet:
    """Progress that nobody watches."""

    def begun(self, trials: int, finished: int) -> None:
        """See `Progress`."""

    def finished(self, number: int, result: Result) -> None:
        """See `Progress`."""


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        study: Optuna's, with every trial.
        finalists: The best, or a front of compromises, as measured in the search and again on fresh keys
            and the judge's images.
        others: The defenses of ``against``, measured as the finalists were.
        records: Of the fresh duels.
        fought: Trials fought by this command.
        seconds: That the search took now.
    """

    study: Study
    finalists: tuple[Finalist, ...]
    others: tuple[Finalist, ...]
    records: tuple[Record, ...]
    fought: int
    seconds: float


def tune(
    search: Search,
    folder: str | Path,
    *,
    cache: str | Path,
    workers: int | None = None,
    plugin_files: Sequence[str | Path] = (),
    database: str | None = None,
    progress: Progress | None = None,
    watcher: Watcher | None = None,
) -> Tuned:
    """Search, and measure the winner again; what is stored already is not done again.

    Args:
        search: What to search.
        folder: Where the study and the fresh duels are kept; made where missing.
        cache: Folder of the victims.
        workers: Processes; default: the search's. With 1, this one.
        plugin_files: Python files with plugins of the search.
        database: URL of a database for the study; default: a journal in the folder.
        progress: Is told how the search goes.
        watcher: Is told how the fresh duels go.

    Raises:
        ConfigError: The study was made for another search, or every trial failed.
        StoreError: The folder is in use or cannot be written.
    """
    workers = workers or search.workers
    files = tuple(Path(path).resolve() for path in plugin_files)
    for path in files:
        load_file(path)
    folder, started = Path(folder), time.perf_counter()
    with _locked(folder), _quiet():
        study = open_study(search, folder, database)
        root = Roots.fromhex(study.user_attrs["root"])
        evaluator = Evaluator(search, Path(cache), root)
        brief = Brief(_plain(search), Path(cache), root, files, threads(workers))
        hired: Crew[Worker[_Job]] = Crew(workers if workers > 1 else 0, lambda: Worker(serve, brief))
        # Processes start while the references are measured here.
        with _owned() as owner, hired as crew:
            references = _references(study, evaluator)
            desk = _Desk(search, study, owner, progress or Quiet())
            fought = _there(desk, crew, references) if crew.workers else _here(desk, evaluator)
        seconds = time.perf_counter() - started
        winners = chosen(search, study)
        experiment, roots = final_experiment(search, winners), root.below("fresh")
        watch = watcher or Silent()
        fresh = folder / FRESH
        matrix.run(
            experiment, fresh, cache=cache, workers=workers, plugin_files=files, progress=watch, roots=roots
        )
        records = _records(fresh)
        secrets = [derive(roots.defender, "response", key) for key in range(search.fresh_keys)]
        everyone: list[FrozenTrial | Defense] = [*winners, *search.against]
        found = []
        for one in everyone:
            defense = one if isinstance(one, Defense) else defense_of(search, one)
            responses = evaluator.fresh_responses(defense, secrets)
            found.append(finalist(search, one, references, records, responses))
    places = len(winners)
    return Tuned(study, tuple(found[:places]), tuple(found[places:]), records, fought, seconds)


def open_study(search: Search, folder: Path, database: str | None = None) -> Study:
    """Make a study, or go on with the one that is stored.

    Raises:
        ConfigError: What is stored was made for another search.
        StoreError: It cannot be read.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        storage = database or JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        study = optuna.create_study(
            storage=storage,
            study_name=search.name,
            directions=["maximize" if o in RISING else "minimize" for o in search.objectives],
            load_if_exists=True,
            pruner=_pruner(search),
        )
    except (OSError, ValueError, KeyError, optuna.exceptions.StorageInternalError) as error:
        where = database or folder / JOURNAL
        raise StoreError(f"cannot use the study in {where}: {error}; choose another folder") from error
    wanted, stored = search.identity(), study.user_attrs.get("search")
    if stored is None:
        study.set_user_attr("search", wanted)
        own = random_root() if search.seed is None else Roots.of_seed(search.seed).below("tune").hex()
        study.set_user_attr("root", own)
        if (start := search.start()) is not None:
            study.enqueue_trial(start)
    elif stored != wanted:
        changed = sorted(
            field for field in wanted.keys() | stored.keys() if wanted.get(field) != stored.get(field)
        )
        raise ConfigError(
            f"{folder} holds a study whose {', '.join(changed)} differ: its trials cannot be compared with "
            "new ones; give another name or --out, or restore what was changed"
        )
    # After what is stored, so that a resumed search does not draw its first trials again.
    roots = Roots.fromhex(study.user_attrs["root"])
    seed = number(derive(roots.attackers, "sampler", len(study.get_trials(deepcopy=False))))
    study.sampler = sampler(search, seed % 2**32, parallel=True)
    return study


class _Desk:
    """Hands out trials and stores what comes of them; only this side writes to the study."""

    def __init__(self, search: Search, study: Study, owner: str, progress: Progress) -> None:
        self.search, self.study = search, study
        self._owner, self._progress = owner, progress
        self._orphans = self._recover()
        self._points = points(search)
        done = sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))
        progress.begun(search.trials, done)
        self.fought = 0

    def _recover(self) -> list[Trial]:
        """Trials that were running when their command died: they go on, under their numbers."""
        from optuna import Trial
        from optuna.trial import TrialState

        found = []
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            owner = frozen.user_attrs.get("owner")
            if owner is None or not alive(owner):
                trial = Trial(self.study, frozen._trial_id)
                trial.set_user_attr("owner", self._owner)
                found.append(trial)
        return found

    def next(self) -> tuple[Trial, dict[str, Any]] | None:
        """A trial to fight, with its values; None where there is no more to do."""
        from optuna.trial import TrialState

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
            trial = self.study.ask()
            trial.set_user_attr("owner", self._owner)
        return trial, {axis.field: axis.suggest(trial) for axis in self.search.space}

    def prune(self, trial: Trial, step: int, value: float) -> bool:
        """Take note of how a trial goes; says whether to give it up."""
        if step not in self.study._storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, step)  # a trial that goes on after a crash has reported its first steps
        return self.search.pruning and trial.should_prune()

    def close(self, trial: Trial, result: Result) -> None:
        """Store how a trial ended."""
        from optuna.trial import TrialState

        trial.set_user_attr("records", [r.model_dump(mode="json") for r in result.records])
        trial.set_user_attr("responses", list(result.responses))
        trial.set_user_attr("reason", result.reason)
        if result.state == "complete":
            self.study.tell(trial, result.values)
        else:
            # Not what Optuna would make of it: a pruned trial's last value is no value of the objective.
            state = TrialState.PRUNED if result.state == "pruned" else TrialState.FAIL
            self.study.tell(trial, state=state)
        self.fought += 1
        self._progress.finished(trial.number, result)


def _here(desk: _Desk, evaluator: Evaluator) -> int:
    while (job := desk.next()) is not None:
        trial, values = job
        result = evaluator.run(values, lambda step, value, trial=trial: desk.prune(trial, step, value))  # type: ignore[misc]
        desk.close(trial, result)
    return desk.fought


def _there(desk: _Desk, crew: Crew[Worker[_Job]], references: tuple[Record, ...]) -> int:
    """Fight in processes; a trial whose worker dies is tried once more."""
    deaths: dict[int, int] = {}

    def give(worker: Worker[_Job], job: _Job | None) -> None:
        worker.task = job
        if job is not None:
            worker.send(job[1])

    for worker in crew.workers:
        worker.send(references)
        give(worker, desk.next())
    while any(worker.task is not None for worker in crew.workers):
        for worker in ready(crew.workers):
            job, said = worker.task, worker.receive()
            assert job is not None
            trial = job[0]
            if isinstance(said, Step):
                worker.send(desk.prune(trial, said.step, said.value))
                continue
            if said is not None:
                desk.close(trial, said)
                give(worker, desk.next())
                continue
            how = worker.death()
            fresh = crew.replace(worker)
            fresh.send(references)
            deaths[trial.number] = deaths.get(trial.number, 0) + 1
            if deaths[trial.number] >= ATTEMPTS:
                reason = f"the worker process died {deaths[trial.number]} times ({how})"
                desk.close(trial, Result("failed", reason=reason))
                job = desk.next()
            give(fresh, job)
    return desk.fought


def _references(study: Study, evaluator: Evaluator) -> tuple[Record, ...]:
    """Measured by the first command, and kept with the study."""
    stored = study.user_attrs.get("references")
    if stored is None:
        stored = [record.model_dump(mode="json") for record in evaluator.measure_references()]
        study.set_user_attr("references", stored)
    evaluator.references = tuple(Record.model_validate(record) for record in stored)
    return evaluator.references


def _plain(search: Search) -> dict[str, Any]:
    """A search as plain data, from which an equal one can be made."""
    rest: dict[str, Any] = {field: getattr(search, field) for field in CHANGEABLE}
    against = [defense.spec() for defense in search.against]
    return search.identity() | rest | {"against": against}


def _pruner(search: Search) -> Any:
    from optuna.pruners import MedianPruner, NopPruner

    single = search.pruning and len(search.objectives) == 1
    return MedianPruner(n_startup_trials=5) if single else NopPruner()


def _records(folder: Path) -> tuple[Record, ...]:
    from deepenc.arena.run.store import Store

    with Store(folder / matrix.DATABASE, create=False) as store:
        return tuple(store.records())


@contextmanager
def _owned() -> Iterator[str]:
    owner = new_owner()
    try:
        yield owner
    finally:
        retire(owner)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time in a folder; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"{folder} is being tuned by another command; wait for it, or give it --workers"
            ) from error
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    from optuna import logging as optuna_logging

    level = optuna_logging.get_verbosity()
    optuna_logging.set_verbosity(optuna_logging.WARNING)
    try:
        yield
    finally:
        optuna_logging.set_verbosity(level)
