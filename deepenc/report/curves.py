"""Curves: what an attack got at each value of one budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deepenc.arena.estimates.summaries import CellSummary
from deepenc.arena.threat import point


@dataclass(frozen=True)
class Line:
    """One attack on one defense along a curve.

    Attributes:
        attack: Label of the attack.
        defense: Name of the defense.
        points: Value of the budget to what was measured there, ascending.
    """

    attack: str
    defense: str
    points: Mapping[float, CellSummary]

    @property
    def falls(self) -> bool:
        """Whether more of the budget did harm, beyond the intervals: an attack that is not well made."""
        found = [s.score for s in self.points.values() if s.score and s.score.interval]
        best_low = 0.0
        for estimate in found:
            assert estimate.interval is not None
            if estimate.interval.high < best_low:
                return True
            best_low = max(best_low, estimate.interval.low)
        return False


@dataclass(frozen=True)
class Chart:
    """All lines of one victim and threat model over one budget.

    Attributes:
        victim: Name of the victim.
        threat: Name of the threat model.
        budget: What runs.
        values: All values that occur, ascending.
        lines: The attacks', then the references'.
    """

    victim: str
    threat: str
    budget: str
    values: tuple[float, ...]
    lines: tuple[Line, ...]


def charts(summaries: Iterable[CellSummary]) -> list[Chart]:
    """Gather the points of all curves, in the order in which they first appear."""
    groups: dict[tuple[str, str, str], dict[tuple[str, str], dict[float, CellSummary]]] = {}
    for summary in summaries:
        found = point(summary.threat)
        if found is not None:
            family, budget, value = found
            lines = groups.setdefault((summary.victim, family, budget), {})
            lines.setdefault((summary.attack, summary.defense), {})[value] = summary
    return [
        Chart(victim, threat, budget, _values(lines.values()), _lines(lines))
        for (victim, threat, budget), lines in groups.items()
    ]


def apart(summaries: Sequence[CellSummary]) -> list[CellSummary]:
    """The summaries that are no points of a curve."""
    return [summary for summary in summaries if point(summary.threat) is None]


def _values(lines: Iterable[Mapping[float, CellSummary]]) -> tuple[float, ...]:
    return tuple(sorted({value for points in lines for value in points}))


def _lines(lines: Mapping[tuple[str, str], Mapping[float, CellSummary]]) -> tuple[Line, ...]:
    made = [
        Line(attack, defense, dict(sorted(points.items()))) for (attack, defense), points in lines.items()
    ]
    return tuple(sorted(made, key=lambda line: next(iter(line.points.values())).reference is not None))
