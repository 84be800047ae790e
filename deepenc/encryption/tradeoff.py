"""Equation 1 solved for many prices of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepenc.encryption.ascent import ascent
from deepenc.encryption.budget import Ledger
from deepenc.encryption.candidates import Candidates
from deepenc.encryption.defense import Allocation
from deepenc.encryption.objective import Form, Response, gain
from deepenc.errors import ConfigError


@dataclass(frozen=True)
class Compromise:
    """What is best at one price of memory.

    Attributes:
        lam: λ of Equation 1.
        allocation: ΔC of the sites that get any.
        memory: ΔMem / Mem; with a ledger in another unit, what is added in that unit over what the victim
            takes.
        response: What the allocation does to the outputs.
        gain: Equation 1.
    """

    lam: float
    allocation: Allocation
    memory: float
    response: Response
    gain: float


def tradeoff(
    candidates: Candidates,
    ledger: Ledger,
    lams: Sequence[float],
    *,
    step: int = 1,
    form: Form = "l2",
) -> tuple[Compromise, ...]:
    """The allocations of the largest gain on one greedy path, for each λ.

    The path is climbed once, up to the budget, and does not depend on λ. Where each step raises the response
    less for its price than the one before it, the best point is that from which no step is worth λ times its
    memory, as if the climb had stopped there; where later steps raise it more, the best point may lie behind
    steps that were not worth it by themselves. Greedy, so a bound from below on the best of all allocations.

    Args:
        candidates: Measures responses; of the channels that it has drawn, which a release draws anew.
        ledger: The budget, which bounds the path, and the sites.
        lams: Values of λ, ``>= 0``, in the unit of the response.
        step: Channels added at a time; fewer where no more fit.
        form: Which number of a response counts, see `objective.gain`.

    Returns:
        One point for each λ, in their order.

    Raises:
        ConfigError: A λ that is no number from 0 up.
    """
    for lam in lams:
        if not 0 <= lam < math.inf:
            raise ConfigError(f"expected a price of memory λ of 0 or more, got {lam}; give another one")
    path = [
        (counts, ledger.cost(counts) / ledger.total, response)
        for counts, response in ascent(candidates, ledger, {}, step, form)
    ]
    found = []
    for lam in lams:
        points = [
            Compromise(lam, counts, memory, response, gain(response, memory, lam, form))
            for counts, memory, response in path
        ]
        # The first of equals is the cheapest; responses that overflowed have no gain.
        found.append(max(points, key=lambda point: point.gain if math.isfinite(point.gain) else -math.inf))
    return tuple(found)
