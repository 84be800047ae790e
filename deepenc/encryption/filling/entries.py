"""The confusion entries of an encrypted network as tensors to be trained; the real ones are constant."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepenc.network.calling import call, call_with
from deepenc.network.gates import gated_tensors
from deepenc.network.sites import Role, Site, Slot, broadcast
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout

STATISTICS = frozenset({Role.MEAN, Role.VARIANCE})
"""Roles that are measured, not trained."""
Limits = Mapping[tuple[str, Slot], tuple[Tensor, Tensor]]
"""Site name and slot to the least and the largest that channels may have there, one number or one for each;
see `limits`."""
TINY = 1e-12


def confusion_mask(layout: Layout, name: str, shape: Sequence[int]) -> Tensor:
    """Which entries of a widened tensor belong to confusion channels.

    Args:
        layout: Where the victim's entries lie.
        name: The tensor's name, one that the layout's slots use.
        shape: Its widened shape.

    Returns:
        Booleans of that shape, on the CPU.
    """
    real = torch.ones(tuple(shape), dtype=torch.bool)
    for dim, index in layout.kept(name, layout.narrowed_shape(name, shape)).items():
        along = torch.zeros(shape[dim], dtype=torch.bool)
        along[index] = True
        real &= broadcast(along, dim, len(shape))
    return ~real


class Confusion:
    """An encrypted network, differentiable with respect to its confusion entries.

    The network itself stays as it is until `store`.

    Args:
        network: The encrypted network.
        layout: Where the victim's entries lie in it.
        frozen: Roles of the tensors whose confusion entries stay constant, too.
        run: Runs a network on a batch; such as a task's ``response``.

    Attributes:
        network: The encrypted network.
        sites: Its sites, confusion channels included.
        values: Tensor name to its confusion entries, ``(entries,)``, in the tensor's order: leaf tensors that
            require gradients, of 32 bits or more.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: Layout,
        frozen: Collection[Role] = STATISTICS,
        run: Callable[[nn.Module, Any], Any] = call,
    ) -> None:
        self.network, self.layout, self._run = network, layout, run
        self.sites = layout.widened_sites()
        self._own = named_tensors(network)
        self._masks: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        fixed = {slot.tensor for site in layout.sites for slot in site.slots if slot.role in frozen}
        for name in layout.changed():
            tensor = self._own[name].detach()
            if name not in fixed and tensor.is_floating_point():
                mask = confusion_mask(layout, name, tensor.shape).to(tensor.device)
                kind = torch.promote_types(tensor.dtype, torch.float32)
                self._masks[name] = mask
                self.values[name] = tensor[mask].to(kind, copy=True).requires_grad_()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have trainable entries, whole; differentiable with respect to ``values``."""
        return {
            name: self._own[name].detach().masked_scatter(self._masks[name], value.to(self._own[name].dtype))
            for name, value in self.values.items()
        }

    def __call__(self, inputs: Any, gates: Mapping[str, Tensor] | None = None) -> Any:
        """Run the network with the present values.

        Args:
            inputs: A batch.
            gates: Site name to a factor for each of its channels, confusion channels included, ``(width,)``.
        """
        changed = self.tensors()
        if gates:
            changed |= gated_tensors(self._own | changed, self.sites, gates)
        return call_with(self.network, changed, inputs, self._run)

    def store(self) -> None:
        """Write the values into the network, in place; its other entries keep their bits."""
        with torch.no_grad():
            for name, value in self.values.items():
                self._own[name].masked_scatter_(self._masks[name], value.to(self._own[name].dtype))

    def cap(self, allowed: Limits) -> None:
        """Bring each confusion channel back within limits, in place: rows are scaled, numbers clipped.

        Args:
            allowed: From `limits`; slots not named stay.
        """
        with torch.no_grad():
            whole = self.tensors()
            for site in self.layout.sites:
                for slot in site.slots if self.layout.positions[site.name] else ():
                    if slot.tensor in whole and (site.name, slot) in allowed:
                        entries = self.layout.confusion_entries(site, slot).to(whole[slot.tensor].device)
                        part = whole[slot.tensor].index_select(slot.dim, entries)
                        capped = _capped(part, slot, *allowed[site.name, slot])
                        whole[slot.tensor].index_copy_(slot.dim, entries, capped)
            for name, value in self.values.items():
                value.copy_(whole[name][self._masks[name]])


def _capped(part: Tensor, slot: Slot, least: Tensor, largest: Tensor) -> Tensor:
    """The entries of some channels in a slot, ``part``, within limits."""
    least, largest = least.to(part), largest.to(part)
    if part.ndim == 1:
        return part.clamp(least, largest)
    rows = part.movedim(slot.dim, 0)
    norm = rows.reshape(len(rows) // slot.block, -1).norm(dim=1)
    wanted = norm.clamp(least, largest)
    factor = torch.where(wanted == norm, 1, wanted / norm.clamp_min(TINY))
    return part * slot.along(factor, part.ndim)


def limits(tensors: Mapping[str, Tensor], sites: Sequence[Site], quantile: float) -> Limits:
    """How large the real channels are in each slot.

    Args:
        tensors: The victim's, by name.
        sites: The victim's sites.
        quantile: Of the real channels, in [0.5, 1]; 1 is the largest.

    Returns:
        For slots in vectors (biases, a normalisation's factors) the range of the entries between that
        quantile and its opposite; for all others the quantile of the channels' norms (and 0).
    """
    result = {}
    for site in sites:
        for slot in site.slots:
            rows = slot.rows(tensors[slot.tensor].detach(), site.width).double()
            if tensors[slot.tensor].ndim == 1:
                least, largest = rows.flatten().quantile(rows.new_tensor([1 - quantile, quantile]))
            else:
                largest = rows.norm(dim=1).quantile(quantile)
                least = torch.zeros_like(largest)
            result[site.name, slot] = (least, largest)
    return result
