"""What a network's channels compute on given inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from deepenc import trees
from deepenc.network.calling import call, removed
from deepenc.network.sites import Role, Site, Slot


def observe(
    network: nn.Module, sites: Sequence[Site], inputs: Any, see: Callable[[Site, Tensor], Any]
) -> None:
    """Show the values of every site's channels: as a consumer sees them, else as their producer makes them.

    Args:
        network: In eval mode; it stays as it is. Its hooks run.
        sites: Its sites; one whose layers are run by no module of their own is not shown.
        inputs: A batch, run at once.
        see: Called with each site and its values, ``(images, width, positions)``, once a site.
    """
    shown: set[str] = set()
    count = trees.size(inputs)

    def show(site: Site, slot: Slot, dim: int, _: nn.Module, *passing: Any) -> None:
        values = passing[-1][0] if isinstance(passing[-1], tuple) and passing[-1] else passing[-1]
        if site.name in shown or not isinstance(values, Tensor):
            return
        shown.add(site.name)
        see(site, _channels(values.detach(), count, site, slot, dim))

    handles = []
    modules = dict(network.named_modules())
    for site in sites:
        for slot, module, dim in _places(modules, site):
            hook = partial(show, site, slot, dim)
            if slot.role is Role.OUTGOING:
                handles.append(module.register_forward_pre_hook(hook))
            else:
                handles.append(module.register_forward_hook(hook))
    with removed(handles), torch.no_grad():
        call(network, inputs)


def _places(modules: Mapping[str, nn.Module], site: Site) -> Iterator[tuple[Slot, nn.Module, int]]:
    """Where a site's values are seen: a slot, its module, and the dimension of the channels there."""
    owned = [(slot, modules.get(slot.module)) for slot in site.slots]
    for slot, module in owned:
        grouped = isinstance(module, _ConvNd) and module.groups > 1
        if slot.role is Role.OUTGOING and isinstance(module, _ConvNd | nn.Linear) and not grouped:
            yield slot, module, 1 if isinstance(module, _ConvNd) else -1
            return
    for role in (Role.SCALE, Role.SHIFT, Role.BIAS, Role.INCOMING):  # who touches them last comes first
        for slot, module in reversed(owned):
            if slot.role is role and module is not None:
                yield slot, module, 1 if isinstance(module, _ConvNd | _BatchNorm) else -1
                return


def _channels(values: Tensor, images: int, site: Site, slot: Slot, dim: int) -> Tensor:
    """A site's part of an activation, ``(images, width, positions)``."""
    part = values.narrow(dim, slot.start, site.width * slot.block).movedim(dim, 1)
    part = part.reshape(len(part), site.width, -1)
    if len(part) == images or len(part) % images:
        return part
    # Windows of an image lie one after the other in the first dimension.
    return part.reshape(images, -1, *part.shape[1:]).transpose(1, 2).flatten(2)
