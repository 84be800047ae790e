"""Hand cells to workers and store what comes back; only this side writes to the database."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from deepenc.arena.plan import Cell, Task
from deepenc.arena.record import Record
from deepenc.arena.run.store import Store
from deepenc.arena.run.worker import Outcome, Workspace, serve
from deepenc.processes import Crew, Worker, ready, threads

ATTEMPTS = 2
"""Workers that a cell may cost before it counts as failed."""


class Progress(Protocol):
    """Is told what a run does, by the one process that coordinates it."""

    def planned(self, total: int, finished: int) -> None:
        """Once, before the first cell: the cells of the plan, and how many are finished already."""

    def started(self, cell: Cell) -> None:
        """A cell is being fought."""

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell's record is stored."""


class Silent:
    """Progress that nobody watches, of a run or of a search."""

    def planned(self, total: int, finished: int) -> None:
        """See `Progress`."""

    def started(self, cell: Cell) -> None:
        """See `Progress`."""

    def finished(self, *_: object, **__: object) -> None:
        """See `Progress`."""


def fight_all(
    groups: Sequence[list[Task]],
    store: Store,
    owner: str,
    workspace: Workspace,
    progress: Progress,
    cache: Path,
    workers: int,
    plugin_files: Sequence[Path],
) -> tuple[int, int]:
    """Fight all cells of all groups, each group by one worker.

    Args:
        groups: Cells that share an encryption.
        store: Takes the records.
        owner: Name of this run.
        workspace: Fights here, where one worker will do.
        progress: Is told what goes on.
        cache: Folder of the victims.
        workers: Processes; with 1, this one.
        plugin_files: Loaded by every worker.

    Returns:
        Cells fought, and encryptions made.
    """
    if workers == 1:
        return _fight_here(groups, store, owner, workspace, progress)
    size = min(workers, len(groups))
    with Crew(size, partial(_Worker, cache, plugin_files, threads(size))) as crew:
        return _Coordinator(groups, store, owner, progress, crew).run()


def _fight_here(
    groups: Sequence[list[Task]], store: Store, owner: str, workspace: Workspace, progress: Progress
) -> tuple[int, int]:
    fought = 0
    for task in (task for group in groups for task in group):
        if store.claim(task.identity, owner):
            progress.started(task.cell)
            record = workspace.fight(task)
            if store.finish(record, owner):
                progress.finished(task.cell, record)
                fought += 1
    return fought, workspace.encryptions


class _Worker(Worker[Task]):
    """A worker process, and the cells that it takes next."""

    def __init__(self, cache: Path, plugin_files: Sequence[Path], threads: int) -> None:
        super().__init__(serve, cache, list(plugin_files), threads)
        self.queue: list[Task] = []
        self.encryptions = 0


class _Coordinator:
    """Deals out groups, one cell at a time, and stores what comes back."""

    def __init__(
        self, groups: Sequence[list[Task]], store: Store, owner: str, progress: Progress, crew: Crew[_Worker]
    ) -> None:
        self._groups = list(groups)
        self._store, self._owner, self._progress, self._crew = store, owner, progress, crew
        self._deaths: dict[str, int] = {}
        self._fought = self._encryptions = 0

    def run(self) -> tuple[int, int]:
        """Go on until nothing is left; says how many cells were fought and encryptions made."""
        for worker in self._crew.workers:
            self._next(worker)
        while any(worker.task is not None for worker in self._crew.workers):
            for worker in ready(self._crew.workers):
                outcome = worker.receive()
                if outcome is None:
                    self._died(worker)
                else:
                    self._came_back(worker, outcome)
        return self._fought, self._encryptions

    def _next(self, worker: _Worker) -> None:
        worker.task = None
        while worker.queue or self._groups:
            if not worker.queue:
                worker.queue = self._groups.pop(0)
            task = worker.queue.pop(0)
            if self._store.claim(task.identity, self._owner):
                self._progress.started(task.cell)
                worker.task = task
                worker.send(task)
                return

    def _came_back(self, worker: _Worker, outcome: Outcome) -> None:
        task = worker.task
        assert task is not None
        if outcome.record is None:
            assert outcome.error is not None
            raise outcome.error
        self._encryptions += outcome.encryptions - worker.encryptions
        worker.encryptions = outcome.encryptions
        if self._store.finish(outcome.record, self._owner):
            self._progress.finished(task.cell, outcome.record)
            self._fought += 1
        self._next(worker)

    def _died(self, worker: _Worker) -> None:
        """Try a dead worker's cell once more; what kills two workers has failed."""
        task, queue = worker.task, worker.queue
        assert task is not None
        fresh = self._crew.replace(worker)
        deaths = self._deaths[task.identity] = self._deaths.get(task.identity, 0) + 1
        fresh.queue = queue
        if deaths < ATTEMPTS:
            fresh.task = task
            fresh.send(task)
            return
        reason = f"the worker process died {deaths} times ({worker.death()})"
        record = task.record(state="failed", reason=reason)
        if self._store.finish(record, self._owner):
            self._progress.finished(task.cell, record)
            self._fought += 1
        self._next(fresh)
