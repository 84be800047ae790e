"""Equation 1's response raised one step at a time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

import numpy as np

from deepenc.encryption.budget import Ledger
from deepenc.encryption.candidates import Candidates
from deepenc.encryption.defense import Allocation
from deepenc.encryption.objective import Form, Response


def ascent(
    candidates: Candidates,
    ledger: Ledger,
    allocation: Mapping[str, int],
    step: int = 1,
    form: Form = "l2",
) -> Iterator[tuple[Allocation, Response]]:
    """Add channels where the response rises most for what they cost, one step at a time.

    Gains are evaluated lazily, as in lazy greedy (Minoux 1978): a site's old gain is taken for a bound, and
    only the largest is looked at anew. The response is not submodular, so that this is a heuristic.

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
    now, turn = candidates.settle(counts), 0
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
            now = candidates.settle(counts)
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
