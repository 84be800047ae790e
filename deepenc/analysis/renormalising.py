"""BatchNorm behind convolutions that have none, for a while; it changes nothing at first, or nearly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from deepenc.analysis.batchnorm import Moments
from deepenc.analysis.folding import absorb, rescale
from deepenc.network.calling import call, removed

NAME = "_norm_behind"
"""Of the BatchNorm, as a part of its convolution."""
KINDS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
"""By the dimensions of what the convolution makes."""
CONSTANT = 1e-12
"""Deviation below which a channel's outputs are all the same."""


@contextmanager
def renormalised(
    network: nn.Module, paths: Sequence[str], inputs: Any, largest: float = math.inf
) -> Iterator[dict[str, _BatchNorm]]:
    """Put a BatchNorm behind convolutions; afterwards each is folded into its convolution.

    A convolution is divided by the deviation of its outputs, and the scale of its BatchNorm is that
    deviation: so the network computes what it did. Where a deviation is too large, the channel's outputs are
    scaled down before the layers behind are measured.

    Args:
        network: Changed in place; in eval mode, now and when it comes back.
        paths: Convolutions, from `Run.unnormalised`; one whose outputs are not finite gets no BatchNorm.
        inputs: A batch to measure deviations on, run at once; a metered network is charged.
        largest: Largest deviation, in medians of those of the first convolution's channels.

    Yields:
        The BatchNorm layers, by the paths of their convolutions.
    """
    layers = {path: cast(_ConvNd, network.get_submodule(path)) for path in paths}
    norms: dict[str, _BatchNorm] = {}
    limit: list[float] = []

    def measure(path: str, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        if path in norms:
            return _through(layer, _, output)
        moments = Moments.of(output)
        if not (moments.mean.isfinite().all() and moments.variance.isfinite().all()):
            return output
        deviation = moments.variance.sqrt()
        if not limit:
            middle = float(deviation.median())
            limit.append(largest * middle if middle > 0 else math.inf)
        down = torch.where(deviation > limit[0], limit[0] / deviation, 1.0)
        norms[path] = norm = normalised(layers[path], moments, down)
        layer.add_module(NAME, norm)
        return output * down.to(output).view(-1, *[1] * (output.dim() - 2))

    try:
        handles = [layer.register_forward_hook(partial(measure, path)) for path, layer in layers.items()]
        with removed(handles), torch.no_grad():
            call(network, inputs)
        with removed([layers[path].register_forward_hook(_through) for path in norms]):
            yield norms
    finally:
        for path, norm in norms.items():
            delattr(layers[path], NAME)
            absorb(layers[path], norm)


def normalised(layer: _ConvNd, moments: Moments, down: Tensor) -> _BatchNorm:
    """Divide a convolution by the deviation of its outputs, in place, and make the BatchNorm that undoes it.

    Weights of one size for all channels are what a learning rate is made for: folded ones are nearly 0 where
    the victim did not need a channel.

    Args:
        layer: The convolution.
        moments: Of its outputs.
        down: What the outputs shall be multiplied by, ``(channels,)``.
    """
    deviation = moments.variance.sqrt()
    divisor = torch.where(deviation > CONSTANT, deviation, 1.0)
    rescale(layer, 1 / divisor, torch.zeros_like(divisor))
    weight = layer.weight
    norm = KINDS[weight.dim()](len(divisor), device=weight.device, dtype=weight.dtype)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.copy_(moments.mean / divisor)
        norm.running_var.copy_(moments.variance / divisor**2)
        norm.weight.copy_(divisor * down * (moments.variance / divisor**2 + norm.eps).sqrt())
        norm.bias.copy_(moments.mean * down)
    return norm.eval()


def _through(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    return cast(Tensor, layer.get_submodule(NAME)(output))
