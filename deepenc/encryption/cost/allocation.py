"""What placements have in common: choosing sites, proportions, and counts of equal memory."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_HALF_UP, Context, Decimal
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BeforeValidator

from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError, near
from deepenc.network.sites import Site


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Patterns of site names, as `select` takes them; a single one may stand without brackets."""


def select(sites: Sequence[Site], patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites whose names match any of the patterns, in the network's order.

    Args:
        sites: The victim's sites.
        patterns: As file names are matched: ``"layer1.*"``, ``"*.conv1"``.

    Raises:
        ConfigError: A pattern matches no site, or there is none.
    """
    if not patterns:
        raise ConfigError("expected at least one pattern of site names, got none; '*' takes all sites")
    for pattern in patterns:
        if not any(fnmatchcase(site.name, pattern) for site in sites):
            raise ConfigError(
                f"no site matches {pattern!r}: {near(pattern, (s.name for s in sites))}"
                if sites
                else f"no site matches {pattern!r}: the network has no sites"
            )
    return tuple(s for s in sites if any(fnmatchcase(s.name, pattern) for pattern in patterns))


def proportional(sites: Sequence[Site], proportion: float) -> Allocation:
    """The same proportion at every site, rounded half up, at least 1.

    Args:
        sites: The sites to widen.
        proportion: Of each site's width, in (0, 1].

    Raises:
        ConfigError: The proportion rounds to nothing at every site.
    """
    exact = Decimal(repr(float(proportion)))
    rounded = {s.name: int((exact * s.width).to_integral_value(ROUND_HALF_UP)) for s in sites}
    if not any(rounded.values()):
        widest = max(site.width for site in sites)
        least = Context(prec=3, rounding=ROUND_CEILING).divide(Decimal("0.5"), Decimal(widest))
        raise ConfigError(
            f"a proportion of {proportion} rounds to nothing: it is less than half a channel at each of the "
            f"{len(sites)} sites; the smallest that inserts anything is {least}"
        )
    return {name: max(1, number) for name, number in rounded.items()}


def same_memory(original: Original, sites: Sequence[Site], budget: Allocation) -> int:
    """The count which, given to each of these sites, costs the memory closest to a budget's.

    Args:
        original: The victim.
        sites: The sites to widen.
        budget: The allocation whose memory is to be matched.

    Returns:
        A count ``>= 1``; the smaller of two equally close.
    """
    tensors = tensors_of(original.model, original.sites)

    def cost(number: int) -> int:
        return memory(tensors, original.sites, {site.name: number for site in sites}).extra_bits

    wanted = memory(tensors, original.sites, budget).extra_bits
    high = 1
    while cost(high) < wanted:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= wanted else (middle, high)
    if low == 0:
        return high
    return low if wanted - cost(low) <= cost(high) - wanted else high
