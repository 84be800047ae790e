"""BatchNorm statistics: finding the layers that keep them, and measuring them anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CHUNK = 64  # images that set one average; small enough for any memory


def layers(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def reestimate(network: nn.Module, inputs: Tensor) -> None:
    """Replace all running statistics by those of the given inputs, in place.

    Every layer sees inputs that the layers before it normalised by the batch, as in training. All else
    (dropout, modes, momentum, gradients) is as before.

    Args:
        network: Any network; one without BatchNorm stays as it is.
        inputs: ``(images, ...)``, at least two.
    """
    found = layers(network)
    if not found:
        return
    with torch.no_grad(), _measuring(network, found):
        for chunk in inputs.tensor_split(math.ceil(len(inputs) / CHUNK)):
            network(chunk)


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

    It is what whoever measures the statistics anew sees. Modes, momenta and flags are as before afterwards.
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
