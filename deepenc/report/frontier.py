"""How much an attacker may hold before the strongest attack gains more than is tolerable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from deepenc.arena.estimates.summaries import WorstSummary, worst
from deepenc.arena.record import Record
from deepenc.arena.threat import point

TOLERABLE = 0.1
"""Largest advantage of the strongest attack, mean over keys, that counts as holding."""


@dataclass(frozen=True)
class Frontier:
    """One defense along one budget of the attacker.

    Attributes:
        victim: Name of the victim.
        defense: Name of the defense.
        threat: Name of the threat model.
        budget: What runs.
        points: Value of the budget to the strongest attack there, ascending.
        holds: The largest value up to which the advantage is tolerable; None where it is not at the least.
    """

    victim: str
    defense: str
    threat: str
    budget: str
    points: dict[float, WorstSummary]
    holds: float | None


def frontiers(records: Sequence[Record], tolerable: float = TOLERABLE) -> list[Frontier]:
    """The frontier of every protecting defense over every curve of a run.

    Attacks that were run under the plain threat model, not along the curve, count at each of its values
    (an attack without labels gains nothing by some), beside the references there: the plain threat model
    should give the least value.

    Args:
        records: Of one run.
        tolerable: Largest advantage that counts as holding.
    """
    plain: dict[tuple[str, str], list[Record]] = defaultdict(list)
    along: dict[tuple[str, str, str], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        found = point(record.threat)
        if found is None:
            plain[record.victim, record.threat].append(record)
        else:
            family, budget, value = found
            along[record.victim, family, budget][value].append(record)
    made: list[Frontier] = []
    for (victim, family, budget), values in along.items():
        by_defense: dict[str, dict[float, WorstSummary]] = defaultdict(dict)
        for value, members in sorted(values.items()):
            everywhere = [r for r in plain[victim, family] if r.reference != "scratch"]
            moved = [r.model_copy(update={"threat": members[0].threat}) for r in everywhere]
            present = {(r.attack, r.defense, r.key, r.repeat) for r in members}
            moved = [r for r in moved if (r.attack, r.defense, r.key, r.repeat) not in present]
            for summary in worst([*members, *moved]):
                by_defense[summary.defense][value] = summary
        for defense, points in by_defense.items():
            made.append(Frontier(victim, defense, family, budget, points, _holds(points, tolerable)))
    return made


def _holds(points: dict[float, WorstSummary], tolerable: float) -> float | None:
    last = None
    for value, summary in points.items():
        if summary.advantage is None or summary.advantage.mean > tolerable:
            break
        last = value
    return last
