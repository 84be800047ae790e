"""The layers that read a site's channels: what normalises their outputs, and what each channel adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from deepenc.analysis.batchnorm import batchnorms
from deepenc.network.calling import call, removed
from deepenc.network.sites import Role, Site, Slot

ENTRIES = 2**24
"""Numbers held at once while contributions are measured."""

Consumer = _ConvNd | nn.Linear


@dataclass(frozen=True, eq=False)
class NormedConsumer:
    """A layer that reads a site's channels, and the BatchNorm that normalises what it makes.

    Attributes:
        consumer: Path of the layer.
        norm: Path of the BatchNorm.
        first: Channel of the BatchNorm that is the consumer's first.
        slot: Where the site's channels lie in the consumer's weights.
    """

    consumer: str
    norm: str
    first: int
    slot: Slot


def readers(network: nn.Module, sites: Sequence[Site], inputs: Any) -> dict[str, list[NormedConsumer]]:
    """Find what can be checked: the consumers of each site whose outputs go into a BatchNorm.

    They are told by their values: the BatchNorm's input holds the consumer's output, alone or concatenated
    with others'. What comes directly before a BatchNorm is `deepenc.analysis.following`'s question.

    Args:
        network: In eval mode; it stays as it is. Its hooks run.
        sites: Its sites.
        inputs: One or two inputs, ``(images, ...)``.

    Returns:
        Site name to its readers, of those that run first and on one and the same input: what runs later may
        be behind other sites. Sites without a reader are left out.
    """
    modules = dict(network.named_modules())
    runs: dict[str, tuple[int, Tensor]] = {}  # consumer -> its input (by identity) and output
    held: list[Tensor] = []  # keeps inputs alive, so that no two have one identity
    found: dict[str, tuple[str, int]] = {}

    def made(path: str, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if path not in runs and given:
            held.append(given[0])
            runs[path] = id(given[0]), output.clone()  # a later layer may work in place

    def normalised(path: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        for consumer in set(runs).difference(found) if given else ():
            first = _within(runs[consumer][1], given[0])
            if first is not None:
                found[consumer] = path, first

    slots = {site.name: outgoing(modules, site) for site in sites}
    consumers = {path for places in slots.values() for path, _ in places}
    handles = [modules[path].register_forward_hook(partial(made, path)) for path in consumers]
    for path, norm in batchnorms(network).items():
        handles.append(norm.register_forward_pre_hook(partial(normalised, path)))
    with removed(handles), torch.no_grad():
        call(network, inputs)
    order = list(runs)
    result = {}
    for name, places in slots.items():
        known = sorted(
            ((p, slot) for p, slot in places if p in found), key=lambda place: order.index(place[0])
        )
        if known:
            shared, _ = runs[known[0][0]]
            result[name] = [NormedConsumer(p, *found[p], slot) for p, slot in known if runs[p][0] == shared]
    return result


def outgoing(modules: Mapping[str, nn.Module], site: Site) -> list[tuple[str, Slot]]:
    """The layers that read a site's channels one for one, with the slot in their weights."""
    places = [(slot.module, slot) for slot in site.slots if slot.role is Role.OUTGOING]
    return [] if site.contracted else [(p, s) for p, s in places if _plain(modules.get(p)) and s.dim == 1]


def _plain(module: nn.Module | None) -> bool:
    convolution = isinstance(module, _ConvNd) and module.groups == 1 and not module.transposed
    return convolution or isinstance(module, nn.Linear)


def _within(output: Tensor, values: Tensor) -> int | None:
    """Channel from which on an activation holds another one, None where it does not."""
    if (
        output.ndim != values.ndim
        or output.shape[0] != values.shape[0]
        or output.shape[2:] != values.shape[2:]
    ):
        return None
    count = output.shape[1]
    same = (values == output[:, :1]).transpose(0, 1).flatten(1).all(1)
    for first in same.nonzero().flatten().tolist():
        if first + count <= values.shape[1] and torch.equal(values[:, first : first + count], output):
            return int(first)
    return None


def silenced(values: Tensor, consumer: nn.Module, slot: Slot, channels: Sequence[int]) -> Tensor:
    """A consumer's input in which some channels are zero; itself where there are none."""
    if not channels:
        return values
    dim = 1 if isinstance(consumer, _ConvNd) else -1
    return values.index_fill(dim, slot.entries(channels).to(values.device), 0.0)


def groups_of(consumer: Consumer, slot: Slot, width: int) -> Tensor:
    """For each input of a consumer the channel of the site, ``width`` where it is none of them."""
    weight = consumer.weight
    groups = torch.full((weight.shape[1],), width, device=weight.device)
    groups[slot.span(width)] = torch.arange(width, device=weight.device).repeat_interleave(slot.block)
    return groups


def contributions(
    consumer: Consumer, rows: Tensor, values: Tensor, groups: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """First and second moments of what groups of inputs add to rows of a consumer's output.

    Args:
        consumer: The layer.
        rows: Its outputs to look at.
        values: Its input.
        groups: Group of each of its inputs.
        count: Number of groups.

    Returns:
        ``(rows, groups)`` and ``(rows, groups, groups)``, float64.
    """
    weight = consumer.weight.detach()[rows].float()
    first = torch.zeros(len(rows), count, dtype=torch.float64, device=values.device)
    second = torch.zeros(len(rows), count, count, dtype=torch.float64, device=values.device)
    size = values[0].numel()
    some = max(1, ENTRIES // size)  # rows of one image
    step = max(1, ENTRIES // (size * min(some, len(rows))))  # images
    samples = 0
    for images in torch.split(values.float(), step):
        for part in torch.split(torch.arange(len(rows), device=values.device), some):
            made = _apart(consumer, images, weight[part])
            grouped = made.new_zeros(len(made), len(part), count, made.shape[-1])
            rowwise = grouped.index_add_(2, groups, made).permute(1, 2, 0, 3).flatten(2).double()
            first[part] += rowwise.sum(2)
            second[part] += rowwise @ rowwise.mT
        samples += rowwise.shape[2]
    return first / samples, second / samples


CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _apart(consumer: Consumer, values: Tensor, weight: Tensor) -> Tensor:
    """What each input of a layer adds to each output: ``(images, outputs, inputs, positions)``."""
    if isinstance(consumer, nn.Linear):
        flat = values.reshape(len(values), -1, 1, values.shape[-1])
        return (flat * weight).permute(0, 2, 3, 1)
    mode = "constant" if consumer.padding_mode == "zeros" else consumer.padding_mode
    padded = F.pad(values, consumer._reversed_padding_repeated_twice, mode=mode)
    inputs, outputs = weight.shape[1], weight.shape[0]
    kernels = weight.transpose(0, 1).reshape(inputs * outputs, 1, *weight.shape[2:])
    made = CONVOLVE[weight.ndim](
        padded, kernels, stride=consumer.stride, dilation=consumer.dilation, groups=inputs
    )
    apart: Tensor = made.reshape(len(made), inputs, outputs, -1).transpose(1, 2)
    return apart
