"""Equation 1 for many prices of memory at once: how much response each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepenc.encryption.budget import Ledger
from deepenc.encryption.candidates import Candidates, climb
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.objective import Memory, Response, gain, memory
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError

Form = Literal["l2", "squared", "relative"]
"""Which number of a `Response` Equation 1 takes; the paper's is ``l2``."""


@dataclass(frozen=True)
class Point:
    """The best allocation found for one price of memory.

    Attributes:
        lam: λ of Equation 1.
        allocation: Confusion channels per site.
        memory: ΔMem / Mem.
        response: Response change, in the form asked for.
        gain: Equation 1.
    """

    lam: float
    allocation: Allocation
    memory: float
    response: float
    gain: float


def tradeoff(
    original: Original, candidates: Candidates, ledger: Ledger, lams: Sequence[float], form: Form = "l2"
) -> list[Point]:
    """Trade response against memory: one greedy path up to the budget, and on it the best point for each λ.

    The larger λ, the less memory the point takes. That the path is greedy makes this a lower bound.

    Args:
        original: The victim.
        candidates: Measures responses.
        ledger: Where the path ends.
        lams: Prices of memory, ``>= 0``.
        form: What of the response counts.

    Returns:
        A point for each λ, in order.

    Raises:
        ConfigError: A price below 0, or none.
    """
    if not lams or min(lams) < 0:
        raise ConfigError(f"expected prices of memory of at least 0, got {list(lams)}")
    path: list[tuple[Allocation, Memory, Response]] = []
    tensors = tensors_of(original.model, original.sites)

    def passed(allocation: Allocation, response: Response) -> None:
        counts = {name: count for name, count in allocation.items() if count}
        path.append((counts, memory(tensors, original.sites, counts), response))

    climb(candidates, ledger, {}, passed=passed)
    points = []
    for lam in lams:
        worth = [gain(getattr(response, form), cost, lam) for _, cost, response in path]
        best = max(range(len(path)), key=lambda i: worth[i])
        counts, cost, response = path[best]
        points.append(Point(lam, counts, cost.ratio, getattr(response, form), worth[best]))
    return points
