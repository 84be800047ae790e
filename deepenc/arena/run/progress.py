"""What a run tells whoever watches it."""

from __future__ import annotations

from collections.abc import Sequence

from deepenc.arena.plan import Cell
from deepenc.arena.record import Record


class Progress:
    """Is told what a run does, by the one process that coordinates it. This one is silent."""

    def planning(self, total: int) -> None:
        """Once, first of all: how many cells the plan will have; a large one takes a while to make."""

    def planned(self, total: int, finished: int) -> None:
        """Once, before the first cell: the cells of the plan, and how many are finished already."""

    def started(self, cell: Cell) -> None:
        """A cell is being run."""

    def running(self, cells: Sequence[tuple[Cell, float]]) -> None:
        """About once a second: the cells that are being run, and since how many seconds."""

    def finished(self, cell: Cell, record: Record) -> None:
        """A cell's record is stored."""
