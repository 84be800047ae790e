"""A mean over keys with its interval, or the reason why none is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from deepenc.arena.estimates.sampled import CONFIDENCE, Sampled, Scale, Table, crossed, of_shares, over_keys

Method = Literal["crossed", "keys", "examples"]
"""What was sampled. ``crossed``: keys and examples, both; ``keys``: keys alone, as they were judged;
``examples``: examples alone, for the keys at hand."""

TOO_FEW, AGREE, NEAR = "too few keys", "keys agree", "scratch too near"
"""Why there is no interval: of one key or two nothing can be said of others; keys that agree to the last
digit say nothing of how far others may be; the scale of an advantage is not known well enough."""

FEWEST = 3
"""Keys from which an interval over keys is given: Student's t of two values covers, but spans next to all."""


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval, and what it takes into account."""

    low: float
    high: float
    method: Method


@dataclass(frozen=True)
class Estimate:
    """A mean over keys, and its spread. A key's value is the mean over its repeats.

    Attributes:
        mean: Over keys.
        least: Of the keys.
        most: Of the keys; for accuracy and advantage this is the owner's worst key.
        worst_key: Index of the key with the most.
        keys: Number of keys.
        interval: Of the mean over all keys and examples there could be; None where it cannot be told.
        lacks: Why there is no interval; empty where there is one.
        sampled: What the interval was made of, for other confidences and tests.
    """

    mean: float
    least: float
    most: float
    worst_key: int
    keys: int
    interval: Interval | None
    lacks: str = ""
    sampled: Sampled | None = None


def estimated(
    by_key: Mapping[int, float],
    scale: Scale = "share",
    *,
    table: Table | None = None,
    examples: int | None = None,
    lacks: str = "",
) -> Estimate | None:
    """A mean over keys.

    Args:
        by_key: A value for each key.
        scale: What the values can be.
        table: What became of each example, ``(keys, examples)``, rows in the order of ``by_key``; their means
            are its values. None where that is not known.
        examples: Examples judged, where each counts as right or wrong, and the table is not known.
        lacks: Why no interval is to be given, if so.

    Returns:
        None without a key.
    """
    if not by_key:
        return None
    values = list(by_key.values())
    worst = max(by_key, key=lambda key: by_key[key])
    known = table is not None and table.shape[1] > 1
    if table is None or not known:
        sampled = over_keys(values)
    else:
        sampled = of_shares(table) if scale == "share" else crossed(table)
    mean = float(np.mean(values))
    found: Interval | None = None
    if not lacks:
        one = len(values) == 1
        found = _binomial(mean, values, scale, table, examples)
        if found is None and sampled.varies and (known if one else len(values) >= FEWEST):
            found = interval(sampled, scale, "examples" if one else "crossed" if known else "keys")
        if found is None:
            lacks = AGREE if len(values) > 1 and not sampled.varies else TOO_FEW
    return Estimate(mean, min(values), by_key[worst], worst, len(values), found, lacks, sampled)


def interval(sampled: Sampled, scale: Scale, method: Method) -> Interval:
    """The 95 % interval of a mean."""
    return Interval(*sampled.limits(scale), method)


def wilson(correct: int, examples: int) -> Interval:
    """Wilson's interval of a share (Wilson 1927).

    >>> wilson(50, 100).low < 0.5 < wilson(50, 100).high
    True
    """
    bounds = binomtest(correct, examples).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(bounds.low), float(bounds.high), "examples")


def _binomial(
    mean: float, values: list[float], scale: Scale, table: Table | None, examples: int | None
) -> Interval | None:
    """Wilson's interval where examples are right or wrong and keys do not differ."""
    if scale != "share" or min(values) < max(values):
        return None
    if table is None:
        return wilson(round(mean * examples), examples) if examples else None
    same = bool((table == table[0]).all())
    right_or_wrong = bool(np.isin(table[0], (0.0, 1.0)).all())
    return wilson(round(mean * table.shape[1]), table.shape[1]) if same and right_or_wrong else None


def unseen(keys: int) -> float:
    """Largest share of all keys that may be worse than the worst of some, with 95 % confidence.

    Free of assumptions: were the share larger, all of the keys would be better with a probability below 5 %
    (Wilks 1941, "Determination of sample sizes for setting tolerance limits").

    >>> round(unseen(1), 2), round(unseen(5), 2), round(unseen(59), 2)
    (0.95, 0.45, 0.05)
    """
    return float(1 - (1 - CONFIDENCE) ** (1 / keys))
