"""A mean over two samples, keys and examples, and the interval that follows from both.

The keys of an experiment are a sample, and so are the judge's examples; every key is judged on the same ones.
That is the crossed design of readers and cases in studies of diagnostic accuracy (Hillis 2007, "A comparison
of denominator degrees of freedom methods for multiple observer ROC analysis", Statistics in Medicine 26). The
variance of the grand mean has a part for keys, known with few degrees of freedom, and one for examples, known
with many. The half width adds them in quadrature, each with a quantile of its own:

    half² = t(n - 1)² · MS_keys / (n m) + z² · max(MS_examples - MS_rest, 0) / (n m)

which is Student's interval where keys are what varies, and the normal one where examples are; Cochran's
approximation for two variances (1964, Biometrics 20), with quadrature for his weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri, stdtrit

Table = NDArray[np.float64]
"""What became of each example under each key, ``(keys, examples)``."""

Scale = Literal["share", "gain", "free"]
"""What a mean can be: a share lies in [0, 1]; a gain mostly does, and may leave it; free knows no ends."""

CONFIDENCE = 0.95

UNEVEN = 0.9
"""How unevenly a share's two tails divide the 5 % that may be missed, at its ends; evenly in the middle.

Where all seems well there is more room for a key that goes wrong than for one that is better still: a sample
of few keys seldom has the former, and its mean is then too near the end. The limit on that side is therefore
taken at a smaller tail, and the other at a larger, with the same sum. The number was chosen by simulation
(`docs/intervals.md`).
"""


@dataclass(frozen=True)
class Sampled:
    """A mean, and the variance that each of two samples brings to it.

    Attributes:
        mean: Over keys and examples.
        keys: Number of keys.
        from_keys: Variance of the mean for the keys drawn, with ``keys - 1`` degrees of freedom; 0 for one.
        from_examples: Variance for the examples drawn, with many; 0 where they are not known.
        from_rest: Variance for what examples do otherwise under one key than under another; in expectation
            it is part of ``from_keys``.
    """

    mean: float
    keys: int
    from_keys: float
    from_examples: float = 0.0
    from_rest: float = 0.0

    def cautious(self) -> Sampled:
        """With no less variance for keys than examples alone explain, which few keys may show by accident."""
        return replace(self, from_keys=max(self.from_keys, self.from_rest))

    @property
    def varies(self) -> bool:
        """Whether anything is known about how far the mean is off."""
        return self.from_keys + self.from_examples > (1e-9 * max(1.0, abs(self.mean))) ** 2

    def reach(self, tail: float) -> float:
        """How far the mean may be off to one side.

        Args:
            tail: Probability of more, in (0, 0.5].
        """
        t = -float(stdtrit(self.keys - 1, tail)) if self.from_keys else 0.0
        return math.hypot(t * math.sqrt(self.from_keys), float(ndtri(tail)) * math.sqrt(self.from_examples))

    def lower(self, tail: float, scale: Scale = "share") -> float:
        """Limit below which the mean lies with this probability; shares by the delta method on logits."""
        return self._limit(-1, tail, scale)

    def upper(self, tail: float, scale: Scale = "share") -> float:
        """Limit above which the mean lies with this probability."""
        return self._limit(1, tail, scale)

    def limits(self, scale: Scale = "share", confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Both ends of a confidence interval."""
        low, high = self._tails(scale, (1 - confidence) / 2)
        return self.lower(low, scale), self.upper(high, scale)

    def at_most(self, scale: Scale = "share", confidence: float = CONFIDENCE) -> float:
        """One-sided upper confidence bound."""
        tail = 1 - confidence
        return self.upper(min(tail, self._tails(scale, tail)[1]), scale)

    def _tails(self, scale: Scale, tail: float) -> tuple[float, float]:
        """Tail below the lower and above the upper limit; their mean is what was given."""
        if scale == "free":
            return tail, tail
        place = 2 * min(max(self.mean, 0.0), 1.0) - 1  # -1 and 1 are the ends
        tilt = UNEVEN * place * abs(place)
        return tail * (1 - tilt), tail * (1 + tilt)

    def _limit(self, side: Literal[-1, 1], tail: float, scale: Scale) -> float:
        reach = side * self.reach(tail)
        if scale != "share":
            return self.mean + reach
        return float(expit(logit(self.mean) + reach / (self.mean * (1 - self.mean))))

    def p_value(self) -> float:
        """Of the hypothesis that the true mean is 0, two-sided; an interval with it as tails just meets 0."""
        if not self.varies:
            return 1.0 if abs(self.mean) < 1e-12 else 0.0

        def beyond(power: float) -> float:
            return self.reach(math.exp(power)) - abs(self.mean)

        least = -700.0
        if beyond(least) < 0:
            return 0.0
        most = math.log(0.5)
        return 2 * math.exp(float(brentq(beyond, least, most))) if beyond(most) < 0 else 1.0


def crossed(table: Table) -> Sampled:
    """The mean of a table whose rows and columns are both samples.

    Args:
        table: ``(keys, examples)``, at least one key and two examples. Rows may also be what an example adds
            to another statistic of a key (see `deepenc.arena.estimates.references`).
    """
    keys, examples = table.shape
    rows, columns, mean = table.mean(axis=1), table.mean(axis=0), float(table.mean())
    if keys == 1:
        return Sampled(mean, 1, 0.0, float(columns.var(ddof=1)) / examples)
    rest = table - rows[:, None] - columns + mean
    from_rest = float((rest**2).sum()) / ((keys - 1) * (examples - 1) * keys * examples)
    from_keys = float(rows.var(ddof=1)) / keys
    return Sampled(
        mean,
        keys,
        from_keys if from_keys > 1e-18 else from_rest,  # counts that are equal by accident
        max(float(columns.var(ddof=1)) / examples - from_rest, 0.0),
        from_rest,
    )


def of_shares(table: Table) -> Sampled:
    """`crossed`, where the outcomes are shares: right or wrong.

    Where hardly an example goes wrong, the ones that would are hardly in the sample. Half an example stands
    for them, but never more than if all keys failed together.
    """
    found, examples = crossed(table), table.shape[1]
    least = min(0.25 / examples, found.mean * (1 - found.mean)) / examples
    return replace(found, from_examples=max(found.from_examples, least))


def over_keys(values: Sequence[float]) -> Sampled:
    """The mean of one value a key, where examples are not known."""
    spread = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    return Sampled(float(np.mean(values)), len(values), spread)
