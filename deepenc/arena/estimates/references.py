"""What an attack is set beside: the stolen original, and training from scratch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deepenc.arena.estimates.estimate import NEAR, Estimate, estimated
from deepenc.arena.estimates.sampled import Table, crossed
from deepenc.arena.outcomes import first_numbers
from deepenc.arena.record import Record

Row = NDArray[np.float64]
"""What each example adds to a key's value, ``(examples,)``; the mean is the value."""

CLEAR = 5.0
"""Standard errors by which the original must be better than scratch for an advantage to have an interval.

With less, the ratio's error is not well described by its linear part (Fieller 1954).
"""


def row(record: Record) -> Row | None:
    """Score of each judged example; None where it was not kept, or the score is no mean over examples."""
    score = record.score
    if score is None or score.outcomes is None:
        return None
    found = first_numbers(score.outcomes)
    if found is None or len(found) != score.examples or abs(float(found.mean()) - score.value) > 1e-6:
        return None
    return found


def by_key(
    records: Iterable[Record], measure: Callable[[Record], float | None]
) -> tuple[dict[int, float], dict[int, list[Record]]]:
    """Mean over repeats of what was measured, for each key; and the records that it was measured on."""
    members: dict[int, list[Record]] = defaultdict(list)
    values: dict[int, list[float]] = defaultdict(list)
    for record in records:
        value = measure(record)
        if value is not None:
            members[record.key].append(record)
            values[record.key].append(value)
    return {key: float(np.mean(found)) for key, found in values.items()}, dict(members)


def table(members: Mapping[int, Sequence[Record]], of: Callable[[Record], Row | None] = row) -> Table | None:
    """Rows of all keys, each the mean over its repeats, ``(keys, examples)``.

    Returns:
        None where a row is missing, or keys were judged on different numbers of examples.
    """
    return stacked([of(record) for record in records] for records in members.values())


def stacked(rows_of_keys: Iterable[Sequence[Row | None]]) -> Table | None:
    """Mean rows of all keys, as for `table`."""
    rows = []
    for found in rows_of_keys:
        known = [one for one in found if one is not None]
        if len(known) < len(found) or len({len(one) for one in known}) != 1:
            return None
        rows.append(np.mean(known, axis=0))
    return np.stack(rows) if rows and len({len(one) for one in rows}) == 1 else None


def advantage(attack: float, scratch: float | None, original: float | None) -> float | None:
    """What an attacker gained: 0 for no more than from scratch, 1 for the original; not clipped.

    Returns:
        None where a reference is missing, or the original is no better than training from scratch.

    >>> advantage(0.7, 0.5, 0.9)
    0.5
    """
    if scratch is None or original is None or original <= scratch:
        return None
    return round((attack - scratch) / (original - scratch), 12)


def gained(attack: Row, scratch: Row, original: Row) -> Row:
    """What each example adds to the advantage of a key, to first order (the delta method).

    It is ``(a - s - A (o - s)) / D + A``, where ``a``, ``s``, ``o`` are the example's scores under attack,
    scratch and original, ``A`` the advantage and ``D`` the difference of the references. An example that is
    hard for all three adds little to any error, since it is hard for all.
    """
    scale = original - scratch
    found = (attack - scratch).mean() / scale.mean()
    return np.asarray((attack - scratch - found * scale) / scale.mean() + found)


def mean_advantage(values: Mapping[int, float], adds: Table | None, scale: Table | None) -> Estimate | None:
    """Mean advantage over keys; the original must be clearly better than scratch for it to have an interval.

    Args:
        values: Advantage of each key.
        adds: What examples add to them, from `gained`, ``(keys, examples)``; None where that is not known.
        scale: What examples add to the difference of the references, likewise.
    """
    lacks = ""
    if scale is not None:
        known = crossed(scale)
        lacks = (
            NEAR if known.mean < CLEAR * math.hypot(known.from_keys**0.5, known.from_examples**0.5) else ""
        )
    return estimated(values, "gain", table=adds, lacks=lacks)


class References:
    """The two ends of the scale: the stolen original, and training from scratch.

    The original is the floor attack on the null defense, scratch the scratch attack on it, for the same
    victim, threat, key and repeat; where exactly that pair is missing, the mean of all that there are. Of
    several reference attacks the best counts.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._found: dict[tuple[str, str, str], dict[tuple[int, int], Record]] = defaultdict(dict)
        for record in records:
            if record.reference and not record.protected and record.score and record.state == "done":
                known = self._found[record.reference, record.victim, record.threat]
                index = (record.key, record.repeat)
                if index not in known or _value(record) > _value(known[index]):
                    known[index] = record

    def rate(self, reference: Literal["floor", "scratch"], record: Record) -> float | None:
        """Score of a reference to be set beside a record; None where it was not measured."""
        beside = self._beside(reference, record)
        return float(np.mean([_value(one) for one in beside])) if beside else None

    def advantage(self, record: Record) -> float | None:
        """Advantage of a record; None where its score or a reference was not measured."""
        if record.score is None or record.state != "done":
            return None
        return advantage(record.score.value, self.rate("scratch", record), self.rate("floor", record))

    def advantages(self, records: Iterable[Record]) -> Estimate | None:
        """Mean advantage over keys, its interval for attack, scratch and original on the same examples."""
        values, members = by_key(records, self.advantage)
        found = mean_advantage(values, table(members, self._adds), table(members, self._scale))
        fixed = all(not r.protected and r.reference for rs in members.values() for r in rs)
        return replace(found, interval=None, lacks="") if found and fixed else found  # 0 or 1 by definition

    def _adds(self, record: Record) -> Row | None:
        attack, scratch, original = row(record), self._row("scratch", record), self._row("floor", record)
        if attack is None or scratch is None or original is None:
            return None
        return gained(attack, scratch, original) if len(attack) == len(scratch) == len(original) else None

    def damage(self, record: Record) -> Row | None:
        """What each example lost against the original; None where it is not known."""
        attack, original = row(record), self._row("floor", record)
        return (
            None if attack is None or original is None or len(attack) != len(original) else original - attack
        )

    def _scale(self, record: Record) -> Row | None:
        """Difference of the references on each example."""
        original, scratch = self._row("floor", record), self._row("scratch", record)
        if original is None or scratch is None or len(original) != len(scratch):
            return None
        return original - scratch

    def _row(self, reference: Literal["floor", "scratch"], record: Record) -> Row | None:
        beside = self._beside(reference, record)
        found = table({0: beside}) if beside else None
        return None if found is None else found[0]

    def _beside(self, reference: Literal["floor", "scratch"], record: Record) -> list[Record]:
        known = self._found.get((reference, record.victim, record.threat), {})
        pair = known.get((record.key, record.repeat))
        return list(known.values()) if pair is None else [pair]


def _value(record: Record) -> float:
    return record.score.value if record.score else 0.0
