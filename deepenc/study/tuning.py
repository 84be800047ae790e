"""Tune a defense: search on tuning data and tuning keys, then measure the winner on fresh ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepenc.arena.record import Record
from deepenc.arena.run import matrix
from deepenc.arena.run.progress import Progress as Watcher
from deepenc.encryption.defense import Defense
from deepenc.plugins import load_file
from deepenc.processes.pool import Pool
from deepenc.processes.worker import warm_up
from deepenc.seeds import Roots, derive
from deepenc.study import workers as worker_side
from deepenc.study.outcome import Finalist, chosen, defense_of, final_experiment, finalist
from deepenc.study.owners import new_owner, retire
from deepenc.study.search import CHANGEABLE, Search
from deepenc.study.storage import locked, open_study, place_of, storing
from deepenc.study.trials import Evaluator
from deepenc.study.workers import Progress, Setup, TrialQueue, run_inline

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FRESH, OUTPUT = "fresh", "output.txt"


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
    where = place_of(folder, database)
    with locked(folder), _quiet():
        study = open_study(search, folder, database)
        root = Roots.fromhex(study.user_attrs["root"])
        evaluator = Evaluator(search, Path(cache), root)
        setup = Setup(_plain(search), Path(cache).absolute(), root, files)
        if workers > 1:
            warm_up([worker_side.__name__])  # while the references are measured here
        with _owned() as owner, Pool(setup, workers, folder / OUTPUT) as pool:
            references = _references(study, where, evaluator)
            told, shared = progress or Progress(), database is not None
            queue = TrialQueue(search, study, where, owner if shared else None, told, references)
            if workers > 1:
                pool.run(queue)
            else:
                run_inline(queue, evaluator)
        seconds = time.perf_counter() - started
        winners = chosen(search, study)
        experiment, roots = final_experiment(search, winners), root.below("fresh")
        fresh = folder / FRESH
        matrix.run(
            experiment,
            fresh,
            cache=cache,
            workers=workers,
            plugin_files=files,
            progress=watcher or Watcher(),
            roots=roots,
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
    return Tuned(study, tuple(found[:places]), tuple(found[places:]), records, queue.fought, seconds)


def _references(study: Study, where: str, evaluator: Evaluator) -> tuple[Record, ...]:
    """Measured by the first command, and kept with the study."""
    stored = study.user_attrs.get("references")
    if stored is None:
        stored = [record.model_dump(mode="json") for record in evaluator.measure_references()]
        with storing(where):
            study.set_user_attr("references", stored)
    evaluator.references = tuple(Record.model_validate(record) for record in stored)
    return evaluator.references


def _plain(search: Search) -> dict[str, Any]:
    """A search as plain data, from which an equal one can be made."""
    rest: dict[str, Any] = {field: getattr(search, field) for field in CHANGEABLE}
    against = [defense.spec() for defense in search.against]
    return search.identity() | rest | {"against": against}


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
def _quiet() -> Iterator[None]:
    from optuna import logging as optuna_logging

    level = optuna_logging.get_verbosity()
    optuna_logging.set_verbosity(optuna_logging.WARNING)
    try:
        yield
    finally:
        optuna_logging.set_verbosity(level)
