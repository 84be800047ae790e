"""What a defense may cost, and allocations that cost no more."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deepenc.encryption.cost.costs import Costs, Sizes, flops
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError
from deepenc.network.sites import Site

MOST = 10
"""A budget above this many times the network is taken for a mistake."""
UNITS = "'5%' or 0.05 (of the memory), {bytes: 20000}, {parameters: 1000}, {flops: 1e6}, {flops: 5%}"


def _amount(value: Any) -> Any:
    """A number above 0, or a share as text."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = Fraction(value.strip().removesuffix("%").strip()) / 100
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"cannot read {value!r}; give a number, or a share such as '5%'") from None
        if not 0 < share <= MOST:
            raise ValueError(f"expected a share above 0 and up to {MOST * 100}%, got {value!r}")
        return value.strip()
    if isinstance(value, bool):
        raise ValueError(f"expected a number or a share such as '5%', got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number or a share such as '5%', got {value!r}") from None
    if not 0 < number < float("inf"):
        raise ValueError(f"expected a number above 0, got {value!r}")
    return number


Amount = Annotated[float | str, BeforeValidator(_amount)]
"""So many, or a share of the victim's as text (``5%``)."""


class Budget(BaseModel):
    """What confusion channels may cost, in one of four units.

    In a configuration ``5%`` or ``0.05`` (ΔMem/Mem of Equation 1), ``{bytes: 20000}``,
    ``{parameters: 1000}``, ``{flops: 1e6}`` or ``{flops: 5%}``; exactly one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    share: float | None = Field(None, gt=0, le=MOST, allow_inf_nan=False)
    """ΔMem/Mem: bits added, per bit of the network's parameters and buffers."""
    bytes: int | None = Field(None, ge=1)
    """Bytes added to parameters and buffers."""
    parameters: int | None = Field(None, ge=1)
    """Entries added to parameters; running statistics and other buffers are free."""
    flops: Amount | None = None
    """Floating-point operations added for one input, as torch counts them (a multiplication and an addition
    are two); or a share of the victim's, as ``5%``."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, str):
            text = data.strip()
            try:
                share = Fraction(text.removesuffix("%").strip())
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"cannot read it; give {UNITS}") from None
            data = float(share / 100) if text.endswith("%") else float(share)
            if text.endswith("%"):
                return {"share": data}
        if isinstance(data, int | float) and not isinstance(data, bool):
            if data > 1:
                raise ValueError(f"more than all of the network; did you mean '{data}%'? Give {UNITS}")
            return {"share": data}
        if isinstance(data, Mapping) and (unknown := sorted(set(map(str, data)) - set(cls.model_fields))):
            raise ValueError(f"unknown unit {unknown[0]!r}; give {UNITS}")
        return data

    @model_validator(mode="after")
    def _one_unit(self) -> Budget:
        if len(self.spec()) != 1:
            raise ValueError(f"a budget has exactly one unit; give {UNITS}")
        return self

    def spec(self) -> dict[str, Any]:
        """The budget as plain data."""
        return self.model_dump(exclude_none=True)

    def holds(self, original: Original, allocation: Mapping[str, int]) -> bool:
        """Whether an allocation costs no more; exact."""
        ledger = Ledger(original, self)
        return ledger.cost(allocation) <= ledger.limit

    def spent(self, original: Original, allocation: Mapping[str, int]) -> float:
        """What share of the budget an allocation costs; above 1 where it does not hold."""
        ledger = Ledger(original, self)
        return ledger.cost(allocation) / ledger.limit


class Ledger:
    """Costs of allocations in the budget's unit, many a second; those in memory are exact.

    Args:
        original: The victim.
        budget: Says the unit and the limit.
        sites: The sites that may get channels; default: all.

    Attributes:
        limit: The budget, in its unit: bits, parameters, or operations.
        total: What the victim takes, in that unit.
        sites: Those sites.

    Raises:
        ConfigError: The budget is below one channel anywhere, or many times the network.
        SiteError: The sites are another network's.
    """

    def __init__(self, original: Original, budget: Budget, sites: Sequence[Site] | None = None) -> None:
        self.sites = tuple(original.sites if sites is None else sites)
        self._what, self._unit = "bytes", 8
        if budget.flops is not None:
            self._what, self._unit = "operations", 1
            self._costs: Costs = flops(original)
        else:
            if budget.parameters is not None:
                self._what, self._unit = "parameters", 1
            tensors = tensors_of(original.model, original.sites)
            parameters = [name for name, _ in original.model.named_parameters(remove_duplicate=False)]
            entries = budget.parameters is not None
            self._costs = Sizes(tensors, original.sites, parameters if entries else None)
        self.total = self._costs.total
        self.limit = _limit(budget, self.total)
        self._check(self.total)

    def _check(self, total: int) -> None:
        what = self._what
        if self.limit > MOST * total:
            raise ConfigError(
                f"a budget of {self.limit // self._unit} {what} is more than {MOST} times the network's "
                f"{total // self._unit}; give less"
            )
        prices = {site.name: self.price({}, site.name) for site in self.sites}
        if prices and min(prices.values()) > self.limit:
            name = min(prices, key=lambda site: prices[site])
            raise ConfigError(
                f"the budget of {self.limit // self._unit} {what} is below one channel anywhere: the "
                f"cheapest, at site {name!r}, takes {prices[name] // self._unit} {what}, "
                f"{-(-(10**5) * prices[name] // max(total, 1)) / 10**3}% of the network; give at least that"
            )

    def cost(self, allocation: Mapping[str, int]) -> int:
        """What an allocation adds, in the budget's unit."""
        return self._costs.cost(allocation)

    def price(self, allocation: Mapping[str, int], site: str, count: int = 1) -> int:
        """What ``count`` more channels at a site add to an allocation's cost; less than 0 for fewer."""
        return self._costs.price(allocation, site, count)

    def room(self, allocation: Mapping[str, int], site: str, most: int | None = None) -> int:
        """The largest number of further channels at a site that the budget pays for, up to ``most``."""
        left = self.limit - self.cost(allocation)
        high = 1
        while (most is None or high <= most) and self.price(allocation, site, high) <= left:
            high *= 2
        low, high = high // 2, high if most is None else min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.price(allocation, site, middle) <= left else (low, middle)
        return low


def _limit(budget: Budget, total: int) -> int:
    if budget.share is not None:
        return int(Fraction(repr(budget.share)) * total)
    if budget.flops is not None:
        return _of(budget.flops, total)
    return budget.parameters if budget.parameters is not None else 8 * (budget.bytes or 0)


def _of(amount: float | str, total: int) -> int:
    if isinstance(amount, str):
        return int(Fraction(amount.removesuffix("%").strip()) / 100 * total)
    return int(amount)


def grow(
    ledger: Ledger,
    allocation: Mapping[str, int],
    score: Callable[[Site, int, int], float],
    most: Mapping[str, int] | None = None,
) -> Allocation:
    """Add channels, one at a time at the site of the largest score, until none fits anywhere.

    Args:
        ledger: The budget and the sites.
        allocation: To begin with; within the budget.
        score: Of one more channel, from the site, its present count, and the price of the channel. It must
            not rise with either.
        most: Largest count for each site; default: none.

    Returns:
        An allocation within the budget, in which one more channel anywhere would exceed it or ``most``.
    """
    counts = {site.name: allocation.get(site.name, 0) for site in ledger.sites} | dict(allocation)
    left = ledger.limit - ledger.cost(counts)
    # Prices rise, so that scores fall: one that is still the largest when looked at again is the largest.
    heap = [(float("-inf"), order) for order in range(len(ledger.sites))]
    while heap:
        known, order = heapq.heappop(heap)
        site = ledger.sites[order]
        count, price = counts[site.name], ledger.price(counts, site.name)
        if price > left or (most is not None and count >= most.get(site.name, 0)):
            continue
        now = -score(site, count, price)
        if now > known:
            heapq.heappush(heap, (now, order))
            continue
        counts[site.name] += 1
        left -= price
        heapq.heappush(heap, (known, order))
    return {name: count for name, count in counts.items() if count}


def caps(ledger: Ledger, widest: float) -> Allocation:
    """The largest counts worth thinking of: what the budget pays for alone, and a multiple of the width.

    Args:
        ledger: The budget and the sites.
        widest: Confusion channels per real channel, at most (at least one channel).
    """
    limits = {site.name: max(1, int(widest * site.width)) for site in ledger.sites}
    return {name: ledger.room({}, name, most) for name, most in limits.items()}
