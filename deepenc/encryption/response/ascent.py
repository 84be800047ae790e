"""Equation 1's response raised one step at a time, and its trade-off for many prices of memory."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepenc.encryption.cost.budget import Ledger
from deepenc.encryption.defense import Allocation
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.objective import Form, Response, gain
from deepenc.errors import ConfigError


def ascent(
    candidates: Candidates,
    ledger: Ledger,
    allocation: Mapping[str, int],
    step: int = 1,
    form: Form = "l2",
) -> Iterator[tuple[Allocation, Response]]:
    """Add channels where the response rises most for what they cost, one step at a time.

    Gains are evaluated lazily, as in lazy greedy (Minoux 1978): a site's old gain is taken for a bound, and
    only the largest is looked at again. The response is not submodular, so that this is a heuristic.

    Args:
        candidates: Measures responses.
        ledger: The budget and the sites.
        allocation: To begin with.
        step: Channels added at a time; fewer where no more fit.
        form: Which number of a response is to rise.

    Yields:
        The allocation to begin with and that after each step, all within the budget, with their responses;
        after the last, one more channel anywhere would exceed the budget, or what the candidates have.
    """
    counts = dict(allocation)
    now, turn = candidates.rebase(counts), 0
    yield _positive(counts), now
    heap = [(float("-inf"), -1, order) for order in range(len(ledger.sites))]
    while heap:
        known, seen, order = heapq.heappop(heap)
        name = ledger.sites[order].name
        more = ledger.room(counts, name, min(step, candidates.most.get(name, 0) - counts.get(name, 0)))
        if more < 1:
            continue
        wanted = {**counts, name: counts.get(name, 0) + more}
        if seen == turn:
            counts, turn = wanted, turn + 1
            now = candidates.rebase(counts)
            heapq.heappush(heap, (known, seen, order))
            yield _positive(counts), now
            continue
        rise = getattr(candidates.response(wanted), form) - getattr(now, form)
        change = rise / ledger.price(counts, name, more)
        heapq.heappush(heap, (float("inf") if np.isnan(change) else -change, turn, order))


def climb(
    candidates: Candidates,
    ledger: Ledger,
    allocation: Mapping[str, int],
    step: int = 1,
    enough: float | None = None,
) -> Allocation:
    """The end of an `ascent` of the response as Equation 1 prints it (`Response.l2`).

    Args:
        candidates: Measures responses.
        ledger: The budget and the sites.
        allocation: To begin with.
        step: Channels added at a time; fewer where no more fit.
        enough: A relative response (`Response.relative`) at which to stop.
    """
    reached: Allocation = {}
    for counts, now in ascent(candidates, ledger, allocation, step):
        reached = counts
        if enough is not None and not now.relative < enough:
            break
    return reached


def _positive(counts: Mapping[str, int]) -> Allocation:
    return {name: count for name, count in counts.items() if count}


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
        candidates: Measures responses; of the channels that it has drawn, which a release draws again.
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
