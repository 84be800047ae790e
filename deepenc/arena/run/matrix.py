"""Run a matrix of duels: plan, run, store; killed at any moment, it goes on where it was."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import torch

from deepenc.arena.plan import Duel, Experiment, plan
from deepenc.arena.run import worker
from deepenc.arena.run.cells import Cells
from deepenc.arena.run.database import EXPECTED, is_url
from deepenc.arena.run.leases import SECONDS, Lease
from deepenc.arena.run.progress import Progress
from deepenc.arena.run.store import Store
from deepenc.encryption.disk.header import HEADER
from deepenc.errors import ConfigError, StoreError
from deepenc.plugins import load_file, loaded_files
from deepenc.processes.pool import Pool
from deepenc.processes.worker import warm_up
from deepenc.seeds import Roots
from deepenc.victims.sources.given import Given, given

DATABASE, OUTPUT = "run.sqlite", "output.txt"

CELLS = 1_000_000
"""Cells of an experiment at most; planning as many takes minutes."""


@dataclass(frozen=True)
class Summary:
    """How a run went.

    Attributes:
        folder: Where its database is.
        states: Cells of the plan by state, those of earlier runs included.
        run: Cells that this run has finished.
        encryptions: Encryptions made for them.
        kept: Finished cells in the database that are not of this experiment.
        seconds: Wall time of this run.
    """

    folder: Path
    states: Mapping[str, int]
    run: int
    encryptions: int
    kept: int
    seconds: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this run is not what was asked for, in words; empty where every cell has an end that is one."""
        words = {
            "running": "being run by another command",
            "planned": "not run",
            "failed": "failed; try again with --retry-failed",
        }
        found = [
            f"{cells_are(self.states[state])} {text}"
            for state, text in words.items()
            if self.states.get(state)
        ]
        if not found and not self.states.get("done"):
            found.append("no cell is done: there is nothing to compare")
        return tuple(found)


def cells_are(count: int) -> str:
    """A number of cells, as the subject of a sentence.

    >>> cells_are(1), cells_are(1200)
    ('1 cell is', '1,200 cells are')
    """
    return f"{count:,} cell is" if count == 1 else f"{count:,} cells are"


def run(
    experiment: Experiment,
    folder: str | Path,
    *,
    cache: str | Path,
    workers: int = 1,
    plugin_files: Sequence[str | Path] = (),
    progress: Progress | None = None,
    retry_failed: bool = False,
    timeout: float | None = None,
    lease: float = SECONDS,
    database: str | None = None,
    roots: Roots | None = None,
) -> Summary:
    """Run all cells of an experiment that are not finished yet, in child processes.

    Finished cells stay as they are and no result is stored twice; when the run is interrupted, its running
    cells are planned again. Several runs on one database share the cells.

    Args:
        experiment: What to run.
        folder: Where the run is kept, in ``run.sqlite``; made where missing. The database holds the root of
            all its keys. What plugins print goes to ``output.txt``.
        cache: Folder of the victims.
        workers: Processes. Each computes with one thread, so that results do not depend on their number.
        plugin_files: Python files with plugins of the experiment, beside those that are loaded here.
        progress: Is told what goes on.
        retry_failed: Run failed cells again, and those that were stopped by a timeout.
        timeout: Seconds that an attack may take at most; None is without limit.
        lease: Seconds after which the cells of a run that is no more are taken over by others.
        database: URL of another database.
        roots: Of keys and seeds, in place of the experiment's own.

    Raises:
        ConfigError: A number of workers below 1, too many cells, or a device that is not there.
        StoreError: The folder or the database cannot be used; what was stored is kept.
        WorkerError: A process cannot start.
        VictimError: A victim cannot be loaded.
        TraceError: A victim cannot be traced.
        SiteError: A victim has no site.
    """
    if workers < 1:
        raise ConfigError(f"expected at least 1 worker, got {workers}")
    if not lease > 0 or not (timeout is None or timeout > 0):
        raise ConfigError(f"expected a lease and a timeout above 0 seconds, got {lease} and {timeout}")
    started = time.perf_counter()
    progress = progress or Progress()
    for path in plugin_files:
        load_file(path)
    folder, cache = Path(folder).absolute(), Path(cache).absolute()
    _refuse_release(folder)
    device = device_of(experiment)
    progress.planning(_count(experiment))
    warm_up([worker.__name__])
    with Store(_target(database, folder)) as store:
        roots = roots or _roots(experiment, store)
        duels = _duels(experiment, roots, worker.Workspace(cache), device)
        store.sync(duels, experiment.spec())
        if retry_failed:
            store.retry_failed()
        with Lease(store, lease) as held:
            queue = Cells(duels, store, held.owner, progress, timeout)
            if queue.left():
                setup = worker.Setup(cache, tuple(loaded_files()), _given(experiment))
                with _pool(folder, setup, min(workers, queue.groups or 1)) as pool:
                    pool.run(queue)
        counts = Counter(store.states().values())
        kept = store.kept()
    seconds = time.perf_counter() - started
    return Summary(folder, dict(counts), queue.run, queue.encryptions, kept, seconds)


def _target(database: str | None, folder: Path) -> str | Path:
    if database is not None and not is_url(database):
        raise StoreError(f"cannot use {database!r} as the URL of a database; {EXPECTED}")
    return database or folder / DATABASE


def _refuse_release(folder: Path) -> None:
    if (folder / HEADER).exists():
        raise StoreError(
            f"{folder} is the folder of an encrypted network, which is given away; a run holds the root of "
            "its keys: choose another folder"
        )


def _count(experiment: Experiment) -> int:
    """How many cells an experiment has, before they are made.

    Raises:
        ConfigError: More than anybody can mean.
    """
    keys, repeats = experiment.keys, experiment.repeats
    once = plan(experiment.model_copy(update={"keys": 1, "repeats": 1}))
    count = sum(min(cell.entry.keys or keys, keys) * repeats for cell in once)
    if count > CELLS:
        raise ConfigError(
            f"expected at most {CELLS:,} cells, got {count:,}: {keys:,} keys, {repeats:,} repeats and "
            f"{len(once):,} pairs of a defense and an attack; is there a slip in `keys` or `repeats`?"
        )
    return count


@contextmanager
def _pool(folder: Path, setup: worker.Setup, size: int) -> Iterator[Pool]:
    """Workers that write what they print to a file in the folder; none is left where nothing was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OUTPUT
    try:
        with Pool(setup, size, path) as pool:
            yield pool
    finally:
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()


def _given(experiment: Experiment) -> bytes | None:
    """The experiment's victims that are in this process's memory alone, pickled; None where there are none.

    Raises:
        ConfigError: A victim cannot be sent to another process.
    """
    labels = {source.label for source in experiment.victims if isinstance(source, Given)}
    held = [victim for victim in given() if victim.name in labels]
    try:
        return cloudpickle.dumps(held) if held else None
    except Exception as error:  # whatever a user's network or data set holds
        raise ConfigError(
            f"the network or its data cannot be sent to the processes that attack it ({error}); open files "
            "and connections in the data set's methods, not in its constructor"
        ) from error


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


def _duels(experiment: Experiment, roots: Roots, workspace: worker.Workspace, device: str) -> list[Duel]:
    return [
        Duel.of(cell, workspace.victim(cell.victim).fingerprint, roots, experiment.judge, device)
        for cell in plan(experiment)
    ]


def _roots(experiment: Experiment, store: Store) -> Roots:
    """From the experiment's seed where it has one; else drawn once, and kept in the database."""
    if experiment.seed is not None:
        return Roots.of_seed(experiment.seed)
    return store.roots()
