"""What a network computes on given inputs: what its BatchNorm layers see, and its channels' values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from deepenc.network.batchnorm import batch_statistics
from deepenc.network.calling import removed
from deepenc.network.sites import Role, Site, Slot

CHUNK = 64
"""Inputs at a time."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of every channel over data and space.

    Attributes:
        mean: ``(channels,)``, float64.
        variance: ``(channels,)``, float64, without the correction for small samples.
    """

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of activations ``(images, channels, ...)``; ``(channels,)`` without images is refused by torch."""
        flat = values.detach().transpose(0, 1).flatten(1).double()
        return cls(flat.mean(1), flat.var(1, correction=0))


def pooled(parts: Sequence[tuple[Moments, int]]) -> Moments:
    """Moments of several samples taken together, each given with its size."""
    total = sum(size for _, size in parts)
    mean = torch.stack([part.mean * size for part, size in parts]).sum(0) / total
    spread = [(part.variance + (part.mean - mean) ** 2) * size for part, size in parts]
    return Moments(mean, torch.stack(spread).sum(0) / total)


def distance(measured: Moments, stored: Moments, eps: float | Tensor) -> Tensor:
    """How far measured statistics are from stored ones, 0 where they agree.

    The squared difference of the means, in stored deviations, and the squared logarithm of the ratio of
    the deviations.

    Args:
        measured: Of any leading shape, the last dimension the channels.
        stored: Of the channels.
        eps: Added to the variances, as BatchNorm does: a channel that is nearly constant is not infinitely
            far from one that is quite constant.
    """
    variance = stored.variance + eps
    ratio = ((measured.variance.clamp_min(0) + eps) / variance).log()
    return (measured.mean - stored.mean) ** 2 / variance + ratio**2 / 4


def stored(layer: _BatchNorm) -> Moments:
    """Running statistics of a BatchNorm layer that keeps them."""
    mean, variance = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
    return Moments(mean.detach().double(), variance.detach().double())


def norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by path."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def norm_moments(network: nn.Module, inputs: Tensor, *, live: bool = False) -> dict[str, Moments]:
    """Statistics of what each BatchNorm layer gets, measured on given inputs.

    Args:
        network: In eval mode; it stays as it is. Its hooks run: a metered network is charged.
        inputs: ``(images, ...)``, at least one, two where `live`.
        live: Whether all layers normalise by the batch; else by their running statistics.

    Returns:
        Path of the layer to its statistics; layers that the network does not run are left out.
    """
    layers = norms(network)
    seen: dict[str, list[tuple[Moments, int]]] = {}

    def see(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        size = given[0].numel() // given[0].shape[1]
        seen.setdefault(path, []).append((Moments.of(given[0]), size))

    handles = [layer.register_forward_pre_hook(partial(see, path)) for path, layer in layers.items()]
    with removed(handles), torch.no_grad(), batch_statistics(network) if live else nullcontext():
        for chunk in torch.tensor_split(inputs, math.ceil(len(inputs) / CHUNK)):
            network(chunk)
    return {path: pooled(parts) for path, parts in seen.items()}


@contextmanager
def batch_moments(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Note what BatchNorm layers see, while it is open: moments of each channel over the last batch.

    Yields:
        Means and variances by the names of the running statistics that they would be, ``(channels,)`` each,
        differentiable; filled by each run of the network.
    """
    found: dict[str, Tensor] = {}

    def see(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        flat = given[0].transpose(0, 1).flatten(1)
        found[f"{path}.running_mean"], found[f"{path}.running_var"] = flat.mean(1), flat.var(1, correction=0)

    with removed([m.register_forward_pre_hook(partial(see, path)) for path, m in norms(network).items()]):
        yield found


def observe(
    network: nn.Module, sites: Sequence[Site], inputs: Tensor, see: Callable[[Site, Tensor], Any]
) -> None:
    """Show the values of every site's channels: as a consumer sees them, else as their producer makes them.

    Args:
        network: In eval mode; it stays as it is. Its hooks run.
        sites: Its sites; one whose layers are run by no module of their own is not shown.
        inputs: ``(images, ...)``, run at once.
        see: Called with each site and its values, ``(images, width, positions)``, once a site.
    """
    shown: set[str] = set()

    def show(site: Site, slot: Slot, dim: int, _: nn.Module, *passing: Any) -> None:
        values = passing[-1][0] if isinstance(passing[-1], tuple) and passing[-1] else passing[-1]
        if site.name in shown or not isinstance(values, Tensor):
            return
        shown.add(site.name)
        see(site, _channels(values.detach(), len(inputs), site, slot, dim))

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
        network(inputs)


def _places(modules: Mapping[str, nn.Module], site: Site) -> Iterator[tuple[Slot, nn.Module, int]]:
    """Where a site's values are seen: a slot, its module, and the dimension of the channels there."""
    owned = [(slot, modules.get(slot.tensor.rpartition(".")[0])) for slot in site.slots]
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
