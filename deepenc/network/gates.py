"""Gates: a factor for every channel of a network, to be learned, or to silence it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import named_tensors, replace_tensors

SMALL = 1e-6
"""Least gate that counts as a site's median."""


def gated_slots(site: Site) -> tuple[Slot, ...]:
    """The slots that a gate multiplies: a channel is silent where they are zero.

    Outgoing weights; where activations are multiplied with one another over the channels, what comes in
    as well.
    """
    roles = {Role.OUTGOING}
    if site.contracted:
        roles |= {Role.INCOMING, Role.BIAS}
    return tuple(slot for slot in site.slots if slot.role in roles)


def gated_tensors(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], gates: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that change when every channel is multiplied by its gate.

    Args:
        tensors: All tensors of the network, by state-dict name.
        sites: Its sites.
        gates: Site name to one factor per channel, ``(width,)``; other sites stay.

    Returns:
        New tensors, differentiable with respect to the gates; the rest of the network's are left out.
    """
    changed: dict[str, Tensor] = {}
    for site in sites:
        if site.name in gates:
            for slot in gated_slots(site):
                tensor = changed.get(slot.tensor, tensors[slot.tensor])
                changed[slot.tensor] = tensor * slot.over(gates[site.name].to(tensor.dtype), tensor, 1.0)
    return changed


class Gated(nn.Module):
    """A network all of whose channels have gates.

    The network's own mode decides what its BatchNorm layers do: in training mode they normalise by the
    batch.

    Args:
        network: To be run; a copy of one's own, since its running statistics change in training mode.
        sites: Its sites.
        value: Of all gates at first.

    Attributes:
        gates: Site name to the gates, ``(width,)``, leaf tensors that require gradients.
    """

    def __init__(self, network: nn.Module, sites: Sequence[Site], value: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.sites = tuple(sites)
        tensors = named_tensors(network)
        self.gates = {
            site.name: torch.full(
                (site.width,), value, device=tensors[site.slots[0].tensor].device, requires_grad=True
            )
            for site in sites
        }

    def forward(self, *inputs: Any, **more: Any) -> Any:
        """Run the gated network."""
        changed = gated_tensors(named_tensors(self.network), self.sites, self.gates)
        return functional_call(self.network, changed, inputs, more)

    def closed(self, threshold: float) -> dict[str, tuple[int, ...]]:
        """Channels whose gates are below a share of their site's median; of every site at least one stays."""
        chosen = {}
        for name, gate in self.gates.items():
            shut = (gate < threshold * gate.median().clamp_min(SMALL)) & (gate < gate.max())
            chosen[name] = tuple(shut.nonzero().flatten().tolist())
        return chosen

    def baked(self) -> nn.Module:
        """A plain network with the gates multiplied into its weights; hooks and modes as the network's."""
        with torch.no_grad():
            tensors = {name: tensor.clone() for name, tensor in named_tensors(self.network).items()}
            tensors |= gated_tensors(tensors, self.sites, self.gates)
        return replace_tensors(self.network, tensors)
