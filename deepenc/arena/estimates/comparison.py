"""Is this defense better than that one, this attack stronger: paired, tested, corrected for their number."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from deepenc.arena.estimates.estimate import FEWEST, TOO_FEW, Interval, estimated, interval
from deepenc.arena.estimates.references import Row, row, stacked
from deepenc.arena.estimates.summaries import Place, strongest
from deepenc.arena.record import Record

LEVEL = 0.05
"""Chance that any comparison of a family is called where there is no difference at all."""

Pairs = Mapping[tuple[int, int], Record]
"""Key and repeat to a record."""


@dataclass(frozen=True)
class Comparison:
    """Two defenses, or two attacks, on the same keys, repeats and examples.

    Attributes:
        victim: Name of the victim.
        threat: Name of the threat model.
        within: The defense on which two attacks are compared; None where defenses are.
        first: Name of the one with the higher score.
        second: Of the other.
        keys: Keys that both were measured on.
        difference: Mean score of the first less that of the second.
        interval: 95 % interval of it, for this comparison alone; None where keys are too few.
        p: P-value of no difference, two-sided: Student's t over keys, joined with the examples'
            (`Sampled.p_value`); None where keys are too few.
        adjusted: The same after Holm's correction over the family.
    """

    victim: str
    threat: str
    within: str | None
    first: str
    second: str
    keys: int
    difference: float
    interval: Interval | None
    p: float | None
    adjusted: float | None = None

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than chance explains."""
        return self.adjusted is not None and self.adjusted < LEVEL

    @property
    def verdict(self) -> str:
        """In words."""
        if self.told_apart:
            return "apart"
        return TOO_FEW if self.p is None else "equal" if self.difference == 0 and self.p == 1 else "tie"


def of_defenses(records: Sequence[Record]) -> list[list[Comparison]]:
    """All pairs of defenses by their strongest attack on each key; a family for each victim and threat."""
    groups: dict[tuple[str, str], dict[str, Pairs]] = defaultdict(dict)
    for (victim, defense, threat), best in strongest(records).items():
        groups[victim, threat][defense] = {(record.key, 0): record for record in best}
    return [_family(victim, threat, None, members) for (victim, threat), members in groups.items()]


def of_attacks(records: Sequence[Record]) -> list[list[Comparison]]:
    """All pairs of attacks on one defense; a family for each victim, threat and defense."""
    groups: dict[tuple[str, str, str], dict[str, dict[tuple[int, int], Record]]] = defaultdict(dict)
    for record in records:
        if record.protected and record.reference != "scratch" and record.state == "done" and record.score:
            of = groups[record.victim, record.threat, record.defense].setdefault(record.attack, {})
            of[record.key, record.repeat] = record
    return [
        _family(victim, threat, defense, members) for (victim, threat, defense), members in groups.items()
    ]


def beside_the_best(family: Sequence[Comparison], best: str) -> list[Comparison]:
    """Those that the best takes part in; corrected for all, since it was chosen by the same numbers."""
    return [one for one in family if best in (one.first, one.second)]


def best_of(family: Sequence[Comparison], *, higher: bool) -> str:
    """Who has more than each other, or less than each other; where nobody has, most often so.

    Args:
        family: All pairs.
        higher: Whether more is better.
    """
    wins: Counter[str] = Counter()
    sums: dict[str, float] = {}
    for one in family:
        winner, loser = (one.first, one.second) if higher else (one.second, one.first)
        wins.update({winner: 1, loser: 0})
        sums[winner] = sums.get(winner, 0.0) + one.difference
    return max(wins, key=lambda name: (wins[name], sums.get(name, 0.0)))


def ties(records: Sequence[Record]) -> dict[Place, str]:
    """Which defenses are the best, by their strongest attacks, or cannot be told from it.

    Returns:
        Victim, defense and threat to ``"best"`` or ``"tie"``, where there are several defenses; others are
        left out.
    """
    marks = {}
    for family in of_defenses(records):
        if not family:
            continue
        victim, threat, best = family[0].victim, family[0].threat, best_of(family, higher=False)
        marks[victim, best, threat] = "best"
        for one in beside_the_best(family, best):
            if not one.told_apart:
                marks[victim, one.second if one.first == best else one.first, threat] = "tie"
    return marks


def compared(first: Pairs, second: Pairs) -> tuple[float, Interval | None, float | None, int] | None:
    """Mean difference of two scores over common keys, its interval, its p-value, and the number of keys.

    Returns:
        None where they have no key in common.
    """
    differences: dict[int, list[float]] = defaultdict(list)
    rows: dict[int, list[Row | None]] = defaultdict(list)
    for index in sorted(first.keys() & second.keys()):
        one, other = first[index], second[index]
        if one.score and other.score:
            differences[index[0]].append(one.score.value - other.score.value)
            rows[index[0]].append(_difference(one, other))
    by_key = {key: float(np.mean(values)) for key, values in differences.items()}
    found = estimated(by_key, "free", table=stacked(rows.values()))
    if found is None or found.sampled is None:
        return None
    if found.keys < FEWEST:
        return found.mean, None, None, found.keys
    sampled = found.sampled.cautious()
    if not sampled.varies:
        same = all(value == 0 for value in by_key.values())
        return found.mean, None, 1.0 if same else None, found.keys
    method = found.interval.method if found.interval else "keys"
    return found.mean, interval(sampled, "free", method), sampled.p_value(), found.keys


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected so that any false one among all is as rare as each was before (Holm 1979).

    >>> [round(p, 2) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(np.asarray(values)[order] * factors))
    adjusted = np.empty(len(values))
    adjusted[order] = raised
    return [float(value) for value in adjusted]


def _family(victim: str, threat: str, within: str | None, members: Mapping[str, Pairs]) -> list[Comparison]:
    made = []
    for (first, one), (second, other) in combinations(members.items(), 2):
        found = compared(one, other)
        if found is None:
            continue
        if found[0] < 0:
            first, second, found = second, first, compared(other, one)
            assert found is not None
        difference, bounds, p, keys = found
        made.append(Comparison(victim, threat, within, first, second, keys, difference, bounds, p))
    tested = [one for one in made if one.p is not None]
    adjusted = iter(holm([one.p for one in tested if one.p is not None]))
    return [one if one.p is None else replace(one, adjusted=next(adjusted)) for one in made]


def _difference(one: Record, other: Record) -> Row | None:
    first, second = row(one), row(other)
    return None if first is None or second is None or len(first) != len(second) else first - second
