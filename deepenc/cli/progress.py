"""What a run does now and how long is left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from deepenc.arena.plan import Cell
from deepenc.arena.record import Record
from deepenc.arena.run.progress import Progress as Watcher
from deepenc.study.outcome import measured
from deepenc.study.search import Search
from deepenc.study.trials import Result
from deepenc.study.workers import Progress as Trials

PAUSE = 10.0
"""Seconds between two lines where there is no terminal."""

LONG = 60.0
"""Seconds without a finished cell after which a line says what is running."""

MANY = 10_000
"""Cells of which a plan takes so long to make that a line says so."""


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
        done = self.done - self.before
        if not done or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) / done * (self.total - self.done)
        return f"about {timedelta(seconds=round(seconds))} left"


class Lines(Watcher):
    """Prints a line at most every `PAUSE` seconds, a last one, and one now and then while nothing ends."""

    def __init__(self, console: Console) -> None:
        self._console, self._estimate, self._last = console, Estimate(), time.monotonic()

    def planning(self, total: int) -> None:
        """See `Watcher`."""
        if total >= MANY:
            self._console.print(f"planning {total:,} cells", soft_wrap=True)

    def planned(self, total: int, finished: int) -> None:
        """See `Watcher`."""
        self._estimate.planned(total, finished)
        self._console.print(f"{total} cells, {finished} of them finished before", soft_wrap=True)

    def running(self, cells: Sequence[tuple[Cell, float]]) -> None:
        """See `Watcher`."""
        now = time.monotonic()
        if cells and now - self._last >= LONG:
            self._last = now
            text = ", and ".join(f"{describe(cell)} ({seconds:.0f} s)" for cell, seconds in cells)
            self._console.print(f"still running: {text}", markup=False, soft_wrap=True)

    def finished(self, cell: Cell, record: Record) -> None:
        """See `Watcher`."""
        self._estimate.done += 1
        now = time.monotonic()
        if now - self._last >= PAUSE or self._estimate.done == self._estimate.total:
            self._last = now
            text = f"{self._estimate.done}/{self._estimate.total} {describe(cell)}: {record.state}"
            left = self._estimate.left()
            self._console.print(f"{text}; {left}" if left else text, markup=False, soft_wrap=True)


class Bar(Watcher):
    """Moves a bar on a terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._estimate = bar, Estimate()
        self._task: TaskID = bar.add_task("", total=None, now="preparing the victims", left="")
        self._running: list[tuple[Cell, float]] = []

    def planned(self, total: int, finished: int) -> None:
        """See `Watcher`."""
        self._estimate.planned(total, finished)
        self._bar.update(self._task, total=total, completed=finished)

    def planning(self, total: int) -> None:
        """See `Watcher`."""
        self._bar.update(self._task, now=f"planning {total:,} cells")

    def running(self, cells: Sequence[tuple[Cell, float]]) -> None:
        """See `Watcher`."""
        self._running = sorted(cells, key=lambda item: -item[1])
        self._show()

    def finished(self, cell: Cell, record: Record) -> None:
        """See `Watcher`."""
        self._estimate.done += 1
        self._bar.update(self._task, completed=self._estimate.done)
        self._show()

    def _show(self) -> None:
        now = f"{describe(self._running[0][0])} ({self._running[0][1]:.0f} s)" if self._running else ""
        more = f" (+{len(self._running) - 1})" if len(self._running) > 1 else ""
        self._bar.update(self._task, now=now + more, left=self._estimate.left())


class TrialLines(Trials):
    """Prints a line for each trial of a search."""

    def __init__(self, console: Console, search: Search) -> None:
        self._console, self._search, self._total = console, search, search.trials

    def planned(self, total: int, finished: int) -> None:
        """See `deepenc.study.workers.Progress`."""
        self._console.print(f"{total} trials, {finished} of them finished before", soft_wrap=True)

    def finished(self, number: int, values: Mapping[str, Any], result: Result) -> None:
        """See `deepenc.study.workers.Progress`."""
        reached = ", ".join(
            f"{objective} {measured(objective, value)}"
            for objective, value in zip(self._search.objectives, result.values, strict=False)
        )
        told = result.reason.strip().splitlines() or [""]
        said = reached or told[-1 if told[0].startswith("Traceback") else 0]
        tried = ", ".join(f"{field}={value}" for field, value in values.items())
        text = f"trial {number + 1}/{self._total} {result.state}: {said}; {tried}"
        self._console.print(text, markup=False, soft_wrap=True)


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
