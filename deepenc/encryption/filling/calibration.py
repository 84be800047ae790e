"""BatchNorm statistics of confusion channels that agree with data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from deepenc.analysis.batchnorm import Moments, batchnorms
from deepenc.network.calling import call, removed
from deepenc.network.gates import gated_tensors
from deepenc.network.sites import Role
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import Layout

Path = Literal["clean", "encrypted"]
"""Where confusion channels' statistics are measured: while all of them are silent, or while they speak."""


def calibrate(network: nn.Module, layout: Layout, inputs: Any, path: Path) -> int:
    """Measure the running statistics of the confusion channels, in place; the real ones' stay.

    Args:
        network: The encrypted network.
        layout: Where the victim's entries lie in it.
        inputs: A batch, run at once.
        path: Along ``"clean"`` a confusion channel sees what the victim's channels make of the inputs; along
            ``"encrypted"`` also what earlier confusion channels add to that, each with its new statistics.

    Returns:
        Number of layers that have new statistics: 0 where no confusion channel has any.
    """
    entries = _entries(network, layout)
    if not entries:
        return 0
    run = network if path == "encrypted" else _silenced(network, layout)
    measured: set[str] = set()

    def measure(name: str, layer: nn.Module, values: Tensor) -> None:
        moments = Moments.of(values)
        for role, buffer in ((Role.MEAN, layer.running_mean), (Role.VARIANCE, layer.running_var)):
            stored, new = cast(Tensor, buffer), moments.mean if role is Role.MEAN else moments.variance
            index = entries[name][role].to(stored.device)
            stored.index_copy_(0, index, new[index].to(stored.dtype))
        measured.add(name)

    handles = [
        layer.register_forward_pre_hook(lambda own, given, name=name: measure(name, own, given[0]))
        for name, layer in run.named_modules()
        if name in entries
    ]
    modes = {module: module.training for module in run.modules()}
    try:
        with removed(handles), torch.no_grad():
            call(run.eval(), inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return len(measured)


def _entries(network: nn.Module, layout: Layout) -> dict[str, Mapping[Role, Tensor]]:
    """Path of each BatchNorm layer that has confusion channels, and their entries in its statistics."""
    known = set(batchnorms(network).values())
    paths = {path for path, module in network.named_modules() if module in known}
    found: dict[str, dict[Role, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for site in layout.sites:
        for slot in site.slots if layout.positions[site.name] else ():
            if slot.role in (Role.MEAN, Role.VARIANCE) and slot.module in paths:
                found[slot.module][slot.role].append(layout.confusion_entries(site, slot))
    return {path: {role: torch.cat(parts) for role, parts in roles.items()} for path, roles in found.items()}


def _silenced(network: nn.Module, layout: Layout) -> nn.Module:
    """The network with silent confusion channels; its running statistics are the network's own tensors."""
    tensors = named_tensors(network)
    gates = {}
    for site in layout.widened_sites():
        gate = torch.ones(site.width, device=tensors[site.slots[0].tensor].device)
        gate[list(layout.positions[site.name])] = 0
        gates[site.name] = gate
    own = {
        slot.tensor: tensors[slot.tensor]
        for site in layout.sites
        for slot in site.slots
        if slot.role in (Role.MEAN, Role.VARIANCE)
    }
    with torch.no_grad():
        return replace_tensors(network, own | gated_tensors(tensors, layout.widened_sites(), gates))
