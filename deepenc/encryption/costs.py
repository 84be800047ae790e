"""What allocations cost: in memory, in operations, and in time."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepenc.encryption.defense import Original
from deepenc.encryption.tensors import shared, tensors_of
from deepenc.errors import ConfigError, SiteError
from deepenc.network.graph import call
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import Layout, insert

MILLISECOND = 10**6
"""In nanoseconds."""
REPEATS = 7
"""Times that a network is timed; the median counts."""
STEP = 0.25
"""Part of its width by which a site is widened to see what that takes."""


class Costs(Protocol):
    """What allocations cost, in whole units."""

    total: int
    """Of the victim."""

    def cost(self, allocation: Mapping[str, int]) -> int:
        """What an allocation adds to the total."""

    def price(self, allocation: Mapping[str, int], site: str, count: int) -> int:
        """What more channels at a site add to an allocation's cost; less than 0 for fewer."""


class Sizes:
    """Bits of parameters and buffers, or entries of parameters, exactly.

    Args:
        original: The victim.
        entries: Whether to count entries of parameters; else bits of everything.

    Raises:
        SiteError: The sites are another network's.
    """

    def __init__(self, original: Original, *, entries: bool) -> None:
        tensors = tensors_of(original.model, original.sites)
        counted = dict(original.model.named_parameters(remove_duplicate=False))
        slots: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for site in original.sites:
            for slot in site.slots:
                if slot.tensor not in tensors or slot.dim >= tensors[slot.tensor].ndim:
                    raise SiteError(
                        f"site {site.name!r} needs dimension {slot.dim} of tensor {slot.tensor!r}, which "
                        "the network does not have; is the site list of another network?"
                    )
                slots[slot.tensor].append((slot.dim, slot.block, site.name))
        self.total = 0
        self._groups: dict[str, list[_Group]] = defaultdict(list)
        for names in shared(tensors):
            first = tensors[names[0]]
            unit = int(any(name in counted for name in names)) if entries else 8 * first.element_size()
            self.total += unit * first.numel()
            group = _Group(unit, [(tuple(tensors[name].shape), slots[name]) for name in names])
            for site_name in {site for name in names for *_, site in slots[name]}:
                self._groups[site_name].append(group)

    def cost(self, allocation: Mapping[str, int]) -> int:
        """See `Costs.cost`."""
        groups = {id(group): group for name in allocation for group in self._groups[name]}
        return sum(group.size(allocation) - group.size({}) for group in groups.values())

    def price(self, allocation: Mapping[str, int], site: str, count: int) -> int:
        """See `Costs.price`."""
        more = {**allocation, site: allocation.get(site, 0) + count}
        return sum(group.size(more) - group.size(allocation) for group in self._groups[site])


class _Group:
    """One tensor, by all names it is tied to."""

    def __init__(
        self, unit: int, named: Sequence[tuple[tuple[int, ...], list[tuple[int, int, str]]]]
    ) -> None:
        self.unit, self.named = unit, named

    def size(self, allocation: Mapping[str, int]) -> int:
        sizes = []
        for shape, slots in self.named:
            grown = list(shape)
            for dim, block, site in slots:
                grown[dim] += block * allocation.get(site, 0)
            sizes.append(prod(grown))
        return self.unit * max(sizes)


class Quadratic:
    """Costs that are the sum of a number for each channel, and one for each pair of channels of two sites.

    Args:
        total: Of the victim.
        single: Site name to the cost of a channel there.
        pairs: Two site names, in one order each, to what a channel at each costs besides; one name twice for
            what two channels of one site do to each other.
    """

    def __init__(
        self, total: int, single: Mapping[str, int], pairs: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        self.total, self._single = total, dict(single)
        self._pairs = {names: value for names, value in (pairs or {}).items() if value}

    def cost(self, allocation: Mapping[str, int]) -> int:
        """See `Costs.cost`."""
        alone = sum(self._single[name] * count for name, count in allocation.items())
        return alone + sum(
            value * self._met(allocation.get(a, 0), allocation.get(b, 0), a == b)
            for (a, b), value in self._pairs.items()
        )

    def price(self, allocation: Mapping[str, int], site: str, count: int) -> int:
        """See `Costs.price`."""
        more = {**allocation, site: allocation.get(site, 0) + count}
        return self.cost(more) - self.cost(allocation)

    @staticmethod
    def _met(first: int, second: int, same: bool) -> int:
        return first * (first - 1) // 2 if same else first * second


def flops(original: Original) -> Quadratic:
    """Floating-point operations of one input, counted by torch on the meta device; exact where it counts.

    Convolutions, matrix products and attention count, element by element operations do not.

    Args:
        original: The victim.

    Raises:
        ConfigError: The network cannot be run on the meta device.
    """
    example, images = _meta(original.example)
    tensors = {name: tensor.to("meta") for name, tensor in named_tensors(original.model).items()}
    bare = replace_tensors(original.model, tensors)

    def counted(allocation: Mapping[str, int]) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            call(_widened(bare, original.sites, allocation), example)
        return int(counter.get_total_flops()) // images

    try:
        total = counted({})
        single = {site.name: counted({site.name: 1}) - total for site in original.sites}
        pairs = {}
        for a, b in _meeting(original.sites):
            both = counted({a: 2} if a == b else {a: 1, b: 1})
            pairs[a, b] = both - total - single[a] - single[b]
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the operations of {type(original.model).__name__} cannot be counted: {error}; give the budget "
            "in memory or parameters"
        ) from error
    return Quadratic(total, single, pairs)


def latency(original: Original, timed: Callable[[nn.Module, Any], int] | None = None) -> Quadratic:
    """Nanoseconds of one input: each site's from a network that is widened there alone; pairs cost nothing.

    Args:
        original: The victim.
        timed: Nanoseconds that a network takes for an example; default: the median of some runs.
    """
    timed = timed or _timed
    images = max(1, _meta(original.example)[1])
    total = timed(original.model, original.example)
    single = {}
    for site in original.sites:
        more = max(1, int(STEP * site.width))
        slower = timed(_widened(original.model, original.sites, {site.name: more}), original.example)
        # Noise must not make a channel free, or pay for others.
        single[site.name] = max(1, (slower - total) // (more * images))
    return Quadratic(total // images, single)


def _timed(network: nn.Module, example: Any) -> int:
    device = next((t.device for t in named_tensors(network).values()), torch.device("cpu"))
    taken = []
    for _ in range(REPEATS + 1):  # the first is slower
        started = time.perf_counter_ns()
        with torch.no_grad():
            call(network, example)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter_ns() - started)
    return int(statistics.median(taken[1:]))


def _widened(model: nn.Module, sites: Sequence[Site], allocation: Mapping[str, int]) -> nn.Module:
    widths = {site.name: site.width for site in sites}
    places = {name: tuple(range(widths[name], widths[name] + n)) for name, n in allocation.items()}
    return insert(model, Layout(sites, places))


def _meta(example: Any) -> tuple[Any, int]:
    """An example without values, and the number of inputs in it."""
    tensors: list[Tensor] = []

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return value.to("meta")
        if isinstance(value, Mapping):
            return {key: moved(part) for key, part in value.items()}
        return type(value)(map(moved, value)) if type(value) in (tuple, list) else value

    made = moved(example)
    return made, max(1, len(tensors[0]) if tensors and tensors[0].ndim else 1)


def _meeting(sites: Sequence[Site]) -> list[tuple[str, str]]:
    """Pairs of sites that widen one tensor along two dimensions, each once."""
    held: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for site in sites:
        for slot in site.slots:
            held[slot.tensor].append((site.name, slot.dim))
    found = {
        (a, b)
        for entries in held.values()
        for i, (a, first) in enumerate(entries)
        for b, second in entries[i + 1 :]
        if first != second
    }
    return sorted({(min(pair), max(pair)) for pair in found})
