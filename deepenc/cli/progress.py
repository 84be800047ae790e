"""What a run does now and how long is left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from deepenc.arena.plan import Cell
from deepenc.arena.record import Record
from deepenc.arena.run.pool import Progress as Watcher

PAUSE = 10.0
"""Seconds between two lines where there is no terminal."""


class Estimate:
    """How much of a run is done, and how long the rest may take."""

    def __init__(self) -> None:
        self.total = self.done = self.before = 0
        self.began = time.monotonic()

    def planned(self, total: int, finished: int) -> None:
        """Start the clock; cells of earlier runs do not count for the speed."""
        self.total, self.done, self.before = total, finished, finished
        self.began = time.monotonic()

    def left(self) -> str:
        """Time left at the mean speed of this run, in words; empty while nobody can tell."""
        fought = self.done - self.before
        if not fought or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) / fought * (self.total - self.done)
        return f"about {timedelta(seconds=round(seconds))} left"


class Lines:
    """Prints a line at most every `PAUSE` seconds, and a last one."""

    def __init__(self, console: Console) -> None:
        self._console, self._estimate, self._last = console, Estimate(), time.monotonic()

    def planned(self, total: int, finished: int) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""
        self._estimate.planned(total, finished)
        self._console.print(f"{total} cells, {finished} of them finished before", soft_wrap=True)

    def started(self, cell: Cell) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""

    def finished(self, cell: Cell, record: Record) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""
        self._estimate.done += 1
        now = time.monotonic()
        if now - self._last >= PAUSE or self._estimate.done == self._estimate.total:
            self._last = now
            text = f"{self._estimate.done}/{self._estimate.total} {describe(cell)}: {record.state}"
            left = self._estimate.left()
            self._console.print(f"{text}; {left}" if left else text, markup=False, soft_wrap=True)


class Bar:
    """Moves a bar on a terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._estimate = bar, Estimate()
        self._task: TaskID = bar.add_task("", total=None, now="preparing the victims", left="")
        self._running: dict[Cell, None] = {}

    def planned(self, total: int, finished: int) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""
        self._estimate.planned(total, finished)
        self._bar.update(self._task, total=total, completed=finished)

    def started(self, cell: Cell) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""
        self._running[cell] = None
        self._show()

    def finished(self, cell: Cell, record: Record) -> None:
        """See `deepenc.arena.run.matrix.Progress`."""
        self._estimate.done += 1
        self._running.pop(cell, None)
        self._bar.update(self._task, completed=self._estimate.done)
        self._show()

    def _show(self) -> None:
        now = describe(next(iter(self._running))) if self._running else ""
        more = f" (+{len(self._running) - 1})" if len(self._running) > 1 else ""
        self._bar.update(self._task, now=now + more, left=self._estimate.left())


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    return f"{cell.victim.label}, {cell.defense.name}, key {cell.key}, {cell.threat.name}, {cell.entry.label}"


@contextmanager
def watch(console: Console) -> Iterator[Watcher]:
    """Show the progress of a run while it lasts."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[now]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Bar(bar)
