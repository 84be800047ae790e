"""What allocations cost: in memory, and in operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deepenc.encryption.defense import Original
from deepenc.encryption.tensors import shared
from deepenc.errors import ConfigError, SiteError
from deepenc.network.calling import call, to_device
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import Layout, insert


class Costs(Protocol):
    """What allocations cost, in whole units."""

    total: int
    """Of the victim."""

    def cost(self, allocation: Mapping[str, int]) -> int:
        """What an allocation adds to the total."""

    def price(self, allocation: Mapping[str, int], site: str, count: int) -> int:
        """What more channels at a site add to an allocation's cost; less than 0 for fewer."""


class Sizes:
    """Bits of all tensors, or entries of some of them, exactly.

    Tensors that two sites widen grow along both dimensions; tied tensors count once.

    Args:
        tensors: The victim's, by name; meta tensors will do.
        sites: The victim's sites.
        counted: Names of the tensors whose entries are counted; default: bits of all tensors.

    Raises:
        SiteError: A site's tensor is missing, or too small in dimensions.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], sites: Sequence[Site], counted: Collection[str] | None = None
    ) -> None:
        slots: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for site in sites:
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
            bits = 8 * first.element_size()
            unit = bits if counted is None else int(any(name in counted for name in names))
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


@dataclass(frozen=True)
class Memory:
    """What a network takes, and what its confusion channels add.

    Attributes:
        bits: Of the victim's parameters and buffers.
        extra_bits: That the confusion channels add to them.
    """

    bits: int
    extra_bits: int

    @property
    def ratio(self) -> float:
        """ΔMem / Mem of Equation 1."""
        return self.extra_bits / self.bits


def memory(tensors: Mapping[str, Tensor], sites: Sequence[Site], allocation: Mapping[str, int]) -> Memory:
    """Memory of a network and of its confusion channels, from shapes alone (meta tensors will do).

    Tensors that two sites widen grow along both dimensions; tied tensors count once.

    Args:
        tensors: The victim's state dict.
        sites: The victim's sites.
        allocation: Confusion channels per site, ``>= 0``; sites not named get none.

    Raises:
        SiteError: A site's tensor is missing, or too small in dimensions.
    """
    sizes = Sizes(tensors, sites)
    return Memory(sizes.total, sizes.cost(allocation))


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
        self._own: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        for names, value in self._pairs.items():
            for name in names:
                self._own[name][names] = value

    def cost(self, allocation: Mapping[str, int]) -> int:
        """See `Costs.cost`."""
        alone = sum(self._single[name] * count for name, count in allocation.items())
        return alone + self._together(allocation, self._pairs)

    def price(self, allocation: Mapping[str, int], site: str, count: int) -> int:
        """See `Costs.price`."""
        more = {**allocation, site: allocation.get(site, 0) + count}
        pairs = self._own.get(site, {})
        return self._single[site] * count + self._together(more, pairs) - self._together(allocation, pairs)

    def _together(self, allocation: Mapping[str, int], pairs: Mapping[tuple[str, str], int]) -> int:
        return sum(
            value * self._met(allocation.get(a, 0), allocation.get(b, 0), a == b)
            for (a, b), value in pairs.items()
        )

    @staticmethod
    def _met(first: int, second: int, same: bool) -> int:
        return first * (first - 1) // 2 if same else first * second


def flops(original: Original) -> Quadratic:
    """Floating-point operations of one input, counted by torch on the meta device; exact where it counts.

    Convolutions, matrix products and attention count, element by element operations do not. That the
    counts add up is checked on a network widened at every site.

    Args:
        original: The victim.

    Raises:
        ConfigError: The network cannot be run on the meta device, or its operations are no sum over pairs.
    """
    example, images = to_device(original.example, "meta"), images_of(original.example)
    tensors = {name: tensor.to("meta") for name, tensor in named_tensors(original.model).items()}
    bare = replace_tensors(original.model, tensors)

    def counted(allocation: Mapping[str, int]) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            call(widened_by(bare, original.sites, allocation), example)
        return int(counter.get_total_flops()) // images

    kind, names = type(original.model).__name__, sorted(site.name for site in original.sites)
    try:
        total = counted({})
        single = {name: counted({name: 1}) - total for name in names}
        everywhere = {name: 3 + order % 3 for order, name in enumerate(names)}
        wanted = counted(everywhere) - total
        for meeting in (_meeting(original.sites), combinations_with_replacement(names, 2)):
            pairs = {}
            for a, b in meeting:
                both = counted({a: 2} if a == b else {a: 1, b: 1})
                pairs[a, b] = both - total - single[a] - single[b]
            costs = Quadratic(total, single, pairs)
            if costs.cost(everywhere) == wanted:
                # Nothing is free, or its sites would get channels without end.
                return Quadratic(total, {name: max(1, each) for name, each in single.items()}, pairs)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"the operations of {kind} cannot be counted: {error}; give the budget in memory or parameters"
        ) from error
    raise ConfigError(
        f"the operations of {kind} are no sum over channels and pairs of channels; give the budget in memory "
        "or parameters"
    )


def widened_by(model: nn.Module, sites: Sequence[Site], allocation: Mapping[str, int]) -> nn.Module:
    """The network with zero-filled channels behind the real ones."""
    return insert(model, Layout.appended(sites, allocation))


def images_of(example: Any) -> int:
    """The number of inputs in an example."""
    first = next((leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)), None)
    return max(1, len(first)) if first is not None and first.ndim else 1


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
