"""Placement: measured response curves, and the best allocation for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy.optimize import Bounds, LinearConstraint, milp

from deepenc.encryption.cost.budget import Ledger, caps, grow
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.response.searched import MeasuredPlacement
from deepenc.network.sites import Site

Curve = tuple[tuple[int, float], ...]
"""Breakpoints (channels, response) of a concave curve that does not fall, from (0, 0) on."""
ROUNDS = 4
"""Times that memory, in which neighbouring sites multiply, is made linear again around the last optimum."""


class Knapsack(MeasuredPlacement):
    """Concave response curves measured site by site, and the integer optimum for their sum.

    Each site alone is widened by a few counts, and the least concave curve above the responses that does
    not fall is taken. The allocation with the largest sum of responses is then found by integer linear
    programming (scipy's HiGHS) for linear prices; those are made exact for the last optimum, in which
    neighbouring sites multiply, a few times over. The result is trimmed and filled to the exact budget.
    That responses add up is an assumption.
    """

    name: ClassVar[str] = "knapsack"

    points: int = Field(4, ge=1, le=64)
    """Counts at which each site is measured, from 1 to the largest, evenly on a logarithmic scale."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Measure curves, then optimise.

        Raises:
            ConfigError: There are no images, or the budget is below one channel.
        """
        ledger = self.ledger(original)
        most = {name: count for name, count in caps(ledger, self.widest).items() if count}
        candidates = self.candidates(original, rng, most)
        candidates.rebase({})
        points = {name: np.unique(np.geomspace(1, n, self.points).round().astype(int)).tolist()
                  for name, n in most.items()}  # fmt: skip
        asked = [(name, count) for name, counts in points.items() for count in counts]
        found = candidates.responses([{name: count} for name, count in asked])
        curves = {}
        for name in most:
            pairs = zip(asked, found, strict=True)
            curves[name] = concave([(count, r.l2) for (site, count), r in pairs if site == name])
        return optimum(ledger, curves)


def concave(points: Sequence[tuple[int, float]]) -> Curve:
    """The least concave curve from (0, 0) above some points that does not fall; without points not finite."""
    hull: list[tuple[int, float]] = [(0, 0.0)]
    highest = 0.0
    for x, y in sorted(point for point in points if np.isfinite(point[1])):
        highest = max(highest, y)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (x, highest)):
            hull.pop()
        hull.append((x, highest))
    return tuple(hull)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def gain_at(curve: Curve, count: int) -> float:
    """What channel ``count + 1`` adds to a curve."""
    return next((_slope(a, b) for a, b in pairwise(curve) if a[0] <= count < b[0]), 0.0)


def best(curves: Mapping[str, Curve], prices: Mapping[str, float], limit: float) -> Allocation:
    """The counts with the largest sum of the curves among those that cost at most ``limit``, linearly."""
    parts = [(name, a, b) for name, curve in curves.items() for a, b in pairwise(curve)]
    if not parts:
        return {}
    solved = milp(
        c=[-_slope(a, b) for _, a, b in parts],
        constraints=LinearConstraint(np.array([[prices[name] / limit for name, *_ in parts]]), ub=1),
        bounds=Bounds(0, np.array([b[0] - a[0] for _, a, b in parts])),
        integrality=np.ones(len(parts), dtype=int),
        options={"time_limit": 60},
    )
    counts = dict.fromkeys(curves, 0)
    for (name, *_), taken in zip(parts, solved.x if solved.x is not None else (), strict=False):
        counts[name] += round(taken)
    return counts


def optimum(ledger: Ledger, curves: Mapping[str, Curve]) -> Allocation:
    """The best of several allocations within the exact budget."""

    def worth(site: Site, count: int, price: int) -> float:
        return gain_at(curves.get(site.name, ((0, 0.0),)), count) / price

    def loss(name: str) -> float:
        return gain_at(curves[name], counts[name] - 1) / -ledger.price(counts, name, -1)

    found: list[tuple[float, Allocation]] = []
    prices = {name: float(ledger.price({}, name)) for name in curves}
    for _ in range(ROUNDS):
        counts = best(curves, prices, ledger.limit)
        # Two sites that meet in one tensor share what their product adds, so that the prices add up.
        for name, count in counts.items():
            if count:
                alone, last = ledger.cost({name: count}), -ledger.price(counts, name, -count)
                prices[name] = (alone + last) / (2 * count)
        while ledger.cost(counts) > ledger.limit:
            name = min((name for name in counts if counts[name]), key=loss)
            counts[name] -= 1
        full = grow(ledger, counts, worth)
        value = sum(gain_at(curve, n) for name, curve in curves.items() for n in range(full.get(name, 0)))
        found.append((value, full))
    return max(found, key=lambda entry: entry[0])[1]
