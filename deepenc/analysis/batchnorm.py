"""BatchNorm: which layers keep running statistics, what they see on given inputs, and re-estimating them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepenc import trees
from deepenc.network.calling import call, removed

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


def batchnorms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by path."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def norm_moments(network: nn.Module, inputs: Any, *, live: bool = False) -> dict[str, Moments]:
    """Statistics of what each BatchNorm layer gets, measured on given inputs.

    Args:
        network: In eval mode; it stays as it is. Its hooks run: a metered network is charged.
        inputs: A batch, at least one, two where `live`.
        live: Whether all layers normalise by the batch; else by their running statistics.

    Returns:
        Path of the layer to its statistics; layers that the network does not run are left out.
    """
    layers = batchnorms(network)
    seen: dict[str, list[tuple[Moments, int]]] = {}

    def see(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        size = given[0].numel() // given[0].shape[1]
        seen.setdefault(path, []).append((Moments.of(given[0]), size))

    handles = [layer.register_forward_pre_hook(partial(see, path)) for path, layer in layers.items()]
    with removed(handles), torch.no_grad(), batch_statistics(network) if live else nullcontext():
        for chunk in trees.chunks(inputs, CHUNK):
            call(network, chunk)
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

    with removed(
        [m.register_forward_pre_hook(partial(see, path)) for path, m in batchnorms(network).items()]
    ):
        yield found


def reestimate(network: nn.Module, inputs: Any) -> None:
    """Replace all running statistics by those of the given inputs, in place.

    Every layer sees inputs that the layers before it normalised by the batch, as in training. All else
    (dropout, modes, momentum, gradients) is as before.

    Args:
        network: Any network; one without BatchNorm stays as it is.
        inputs: A batch, at least two.
    """
    found = list(batchnorms(network).values())
    if not found:
        return
    with torch.no_grad(), _measuring(network, found):
        for chunk in trees.chunks(inputs, CHUNK):
            call(network, chunk)


@contextmanager
def _measuring(network: nn.Module, found: list[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    momenta = {layer: layer.momentum for layer in found}
    network.eval()
    for layer in found:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # a cumulative average: every chunk counts alike
    try:
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def batch_statistics(network: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers normalise by the batch, and neither use nor change their running statistics.

    It is what whoever re-estimates the statistics sees. Modes, momenta and flags are as before afterwards.
    """
    every = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [(layer, layer.training, layer.track_running_stats) for layer in every]
    try:
        for layer in every:
            # In this mode running statistics are neither used nor changed.
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, training, track in before:
            layer.training, layer.track_running_stats = training, track
