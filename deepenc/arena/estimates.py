"""A mean over keys, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval.

    Attributes:
        low: Lower end.
        high: Upper end.
        unit: What was sampled: the judge's ``"images"`` (Wilson), or ``"keys"`` (bootstrap).
    """

    low: float
    high: float
    unit: Literal["images", "keys"]


@dataclass(frozen=True)
class Estimate:
    """A mean over keys, and its spread. A key's value is the mean over its repeats.

    Attributes:
        mean: Over keys.
        least: Of the keys.
        most: Of the keys; for accuracy and advantage this is the owner's worst key.
        worst_key: Index of the key with the most.
        keys: Number of keys.
        interval: Of the mean; None where there is too little to say.
    """

    mean: float
    least: float
    most: float
    worst_key: int
    keys: int
    interval: Interval | None


def wilson(correct: int, images: int) -> Interval:
    """Wilson's interval of a share (Wilson 1927).

    >>> wilson(50, 100).low < 0.5 < wilson(50, 100).high
    True
    """
    bounds = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(bounds.low), float(bounds.high), "images")


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """Percentile bootstrap of the mean over keys; each value belongs to one key, whole.

    With three keys it can do no better than span from the least to the most, and covers less than 95 %: take
    more keys where the width matters.

    Returns:
        None for fewer than two values.
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = rng.choice(np.asarray(values), size=(resamples, len(values))).mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high), "keys")
