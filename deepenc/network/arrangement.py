"""A network's own channels in another order, and rescaled by powers of two; undone exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deepenc.errors import SiteError
from deepenc.network.guard import guarded
from deepenc.network.proving.reference import Expected, pristine, reference
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import State, named_tensors, replace_tensors
from deepenc.network.surgery import narrow

LARGEST = 16
"""Largest exponent in absolute value."""
_NORMALISED = frozenset({Role.SCALE, Role.SHIFT})
_MADE = frozenset({Role.INCOMING, Role.BIAS})


@dataclass(frozen=True)
class Arrangement:
    """How the channels of a network's sites are ordered and scaled.

    Attributes:
        order: Site name -> for each place, the channel that now stands there, ``(width,)``; sites not named
            stay.
        powers: Site name -> for each channel, in the old order, the exponent of the power of two by which its
            values are multiplied, ``(width,)``; what uses them is divided.
    """

    order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    powers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is arranged."""
        return bool(self.order or self.powers)

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse an arrangement that is none of these sites.

        Raises:
            SiteError: An unknown site, an order that is no permutation, or an exponent that is too large.
        """
        widths = {site.name: site.width for site in sites}
        for name, order in self.order.items():
            if sorted(order) != list(range(widths.get(name, -1))):
                raise SiteError(f"site {name!r}: expected an order of {widths.get(name, 0)} channels")
        for name, powers in self.powers.items():
            if len(powers) != widths.get(name, -1) or any(abs(power) > LARGEST for power in powers):
                raise SiteError(
                    f"site {name!r}: expected {widths.get(name, 0)} exponents of at most {LARGEST}"
                )

    def only(self, names: set[str]) -> Arrangement:
        """The arrangement of some sites."""
        return Arrangement(
            {name: order for name, order in self.order.items() if name in names},
            {name: powers for name, powers in self.powers.items() if name in names},
        )

    def apply(self, tensors: State, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The tensors that the arrangement changes, as it makes them.

        Args:
            tensors: The network's, by state-dict name.
            sites: Its sites.
        """
        return {
            name: narrow(self._scaled(tensors[name], slots, 1), self._index(tensors[name], slots, False))
            for name, slots in self._slots(tensors, sites)
        }

    def undo(self, tensors: State, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The tensors that `apply` changed, as they were before; its exact inverse."""
        return {
            name: self._scaled(narrow(tensors[name], self._index(tensors[name], slots, True)), slots, -1)
            for name, slots in self._slots(tensors, sites)
        }

    def _slots(self, tensors: State, sites: Sequence[Site]) -> Iterator[tuple[str, list[tuple[Site, Slot]]]]:
        found: dict[str, list[tuple[Site, Slot]]] = defaultdict(list)
        for site in sites:
            for slot in site.slots if site.name in self.order or site.name in self.powers else ():
                found[slot.tensor].append((site, slot))
        yield from ((name, slots) for name, slots in found.items() if name in tensors)

    def _index(self, tensor: Tensor, slots: Sequence[tuple[Site, Slot]], back: bool) -> dict[int, Tensor]:
        """For each dimension, which entry comes to each place."""
        index: dict[int, Tensor] = {}
        for site, slot in slots:
            if site.name not in self.order:
                continue
            order = torch.tensor(self.order[site.name])
            order = order.argsort() if back else order
            along = index.setdefault(slot.dim, torch.arange(tensor.shape[slot.dim]))
            along[slot.span(site.width)] = slot.entries(order)
        return index

    def _scaled(self, tensor: Tensor, slots: Sequence[tuple[Site, Slot]], sign: int) -> Tensor:
        for site, slot in slots:
            powers = self.powers.get(site.name)
            direction = sign * _direction(site, slot)
            if powers is not None and direction:
                factors = torch.exp2(direction * torch.tensor(powers, dtype=torch.float64))
                tensor = tensor * slot.over(factors, tensor, 1.0).to(tensor)
        return tensor


def _direction(site: Site, slot: Slot) -> int:
    """1 where a channel's entries grow with its values, -1 where they shrink to make up for it, else 0."""
    normalised = any(other.role in _NORMALISED for other in site.slots)
    if slot.role is Role.OUTGOING:
        return -1
    return int(slot.role in (_NORMALISED if normalised else _MADE))


def proved(model: nn.Module, example: Any, sites: Sequence[Site], wanted: Arrangement) -> Arrangement:
    """The part of an arrangement that leaves a network's function as it is, and can be undone bit for bit.

    All of it is tried at once, and site by site where that fails: first with order and powers, then with the
    order alone. What lies between a rescaled channel's weights must be positively homogeneous, as a ReLU is.

    Args:
        model: The network, in eval mode; untouched.
        example: As for `deepenc.find_sites`.
        sites: Its sites.
        wanted: The arrangement.
    """
    with guarded(model):
        return _proved(model, example, sites, wanted)


def _proved(model: nn.Module, example: Any, sites: Sequence[Site], wanted: Arrangement) -> Arrangement:
    tensors = named_tensors(model)
    expected = reference(model, example)

    def right(part: Arrangement) -> bool:
        changed = part.apply(tensors, sites)
        back = part.undo(changed, sites)
        if not all(torch.equal(back[name], tensors[name]) for name in changed):
            return False
        return expected.agrees(Expected.of(pristine(replace_tensors(model, changed)), example).outputs)

    if right(wanted):
        return wanted
    order: dict[str, tuple[int, ...]] = {}
    powers: dict[str, tuple[int, ...]] = {}
    for site in sites:
        alone = wanted.only({site.name})
        for part in (alone, replace(alone, powers={})):
            if part and right(part):
                order |= part.order
                powers |= part.powers
                break
    kept = Arrangement(order, powers)
    return kept if not kept or right(kept) else Arrangement()
