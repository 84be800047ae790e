"""Run a matrix of duels: plan, fight, store; killed at any moment, it goes on where it was."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from deepenc.arena.plan import Experiment, Task, plan
from deepenc.arena.run.leases import new_owner, retire
from deepenc.arena.run.pool import Progress, Silent, fight_all
from deepenc.arena.run.store import Store
from deepenc.arena.run.worker import Workspace
from deepenc.errors import ConfigError
from deepenc.plugins import load_file
from deepenc.seeds import Roots, random_root

log = logging.getLogger(__name__)

DATABASE = "run.sqlite"


@dataclass(frozen=True)
class Summary:
    """How a run went.

    Attributes:
        folder: Where its database is.
        states: Cells of the plan by state, those of earlier runs included.
        fought: Cells fought in this run.
        encryptions: Encryptions made in this run.
        seconds: Wall time of this run.
    """

    folder: Path
    states: Mapping[str, int]
    fought: int
    encryptions: int
    seconds: float


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    cache: str | Path,
    workers: int = 1,
    plugin_files: Sequence[str | Path] = (),
    progress: Progress | None = None,
    retry_failed: bool = False,
    database: str | None = None,
    roots: Roots | None = None,
) -> Summary:
    """Fight all cells of an experiment that are not finished yet.

    Finished cells stay as they are and nothing is fought twice; when the run is interrupted, its running
    cells are planned again.

    Args:
        experiment: What to fight.
        folder: Where the run is kept, in ``run.sqlite``; made where missing.
        cache: Folder of the victims.
        workers: Processes that fight; with 1, this one.
        plugin_files: Python files with plugins of the experiment.
        progress: Is told what goes on.
        retry_failed: Fight failed cells again.
        database: URL of another database.
        roots: Of keys and seeds, in place of the experiment's own.

    Raises:
        ConfigError: A number of workers below 1, or a device that is not there.
        StoreError: The database cannot be used; what was stored is kept.
        VictimError: A victim cannot be loaded.
        TraceError: A victim cannot be traced.
        SiteError: A victim has no site.
    """
    if workers < 1:
        raise ConfigError(f"expected at least 1 worker, got {workers}")
    started = time.perf_counter()
    progress = progress or Silent()
    files = [Path(path).resolve() for path in plugin_files]
    for path in files:
        load_file(path)
    folder = Path(folder)
    workspace = Workspace(Path(cache))
    with Store(database or folder / DATABASE) as store:
        roots = roots or _roots(experiment, store)
        tasks = _tasks(experiment, roots, workspace, device_of(experiment))
        store.sync(tasks, experiment.spec())
        store.recover()
        if retry_failed:
            store.retry_failed()
        states = store.states()
        ended = sum(state not in ("planned", "running") for state in states.values())
        progress.planned(len(states), ended)
        pending = [task for task in tasks if states[task.identity] == "planned"]
        with _ownership(store) as owner:
            fought, encryptions = fight_all(
                _groups(pending), store, owner, workspace, progress, Path(cache), workers, files
            )
        counts = Counter(store.states().values())
    if counts["running"]:
        log.warning("%d cells are being fought by another run on this database", counts["running"])
    return Summary(folder, dict(counts), fought, encryptions, time.perf_counter() - started)


def device_of(experiment: Experiment) -> str:
    """The device an experiment runs on: ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: It asks for CUDA where there is none.
    """
    if experiment.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if experiment.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA device, found none; use auto or cpu")
    return experiment.device


def _tasks(experiment: Experiment, roots: Roots, workspace: Workspace, device: str) -> list[Task]:
    return [
        Task.of(cell, workspace.victim(cell.victim).fingerprint, roots, experiment.judge, device)
        for cell in plan(experiment)
    ]


def _roots(experiment: Experiment, store: Store) -> Roots:
    """From the experiment's seed where it has one; else drawn once, and kept in the database."""
    if experiment.seed is not None:
        return Roots.of_seed(experiment.seed)
    return Roots.fromhex(store.put_new("root", random_root()))


@contextmanager
def _ownership(store: Store) -> Iterator[str]:
    """However the run ends, the cells it leaves running are planned again."""
    owner = new_owner()
    try:
        yield owner
    finally:
        try:
            store.release(owner)
        finally:
            retire(owner)


def _groups(tasks: Sequence[Task]) -> list[list[Task]]:
    """Cells that share an encryption, together; in the plan's order."""
    groups: dict[bytes, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.secret, []).append(task)
    return list(groups.values())
