"""What can be asked of a network without labels: to be sure, and to agree with its own statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepenc.analysis.batchnorm import Moments, batchnorms, distance, stored
from deepenc.network.calling import call, removed

SMALL = 1e-12


def information(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction less the mean entropy of predictions, in nats.

    Sure of each image, and of every class alike: the most is log(classes), for a network that says the same
    of every image 0.

    Args:
        logits: ``(rows, classes)``.
    """
    logs = logits.log_softmax(dim=1)
    chances = logs.exp()
    mean = chances.mean(dim=0)
    return (chances * logs).sum(dim=1).mean() - (mean * mean.clamp_min(SMALL).log()).sum()


@contextmanager
def mismatches(network: nn.Module, before: Mapping[str, _BatchNorm]) -> Iterator[list[Tensor]]:
    """Collect, while the network runs, how far what each BatchNorm layer gets is from what it stored.

    A channel counts by the logarithm: those that never fit, confusion channels, shall not outweigh the rest.

    Args:
        network: Is run inside.
        before: The layers with the statistics to compare with, by path.

    Yields:
        A list to which each layer adds one differentiable number ``>= 0`` per forward pass.
    """
    found: list[Tensor] = []

    def see(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        values = given[0].transpose(0, 1).flatten(1)
        moments = Moments(values.mean(1), values.var(1, correction=0))
        layer = before[path]
        found.append(distance(moments, stored(layer), layer.eps).log1p().mean())

    handles = [
        layer.register_forward_pre_hook(partial(see, path)) for path, layer in batchnorms(network).items()
    ]
    with removed(handles):
        yield found


def inconsistency(network: nn.Module, inputs: Any) -> float:
    """Mean over BatchNorm layers of `mismatches` with the layers' own statistics; 0 without such layers."""
    with torch.no_grad(), mismatches(network, batchnorms(network)) as missed:
        call(network, inputs)
    return float(torch.stack(missed).mean()) if missed else 0.0
