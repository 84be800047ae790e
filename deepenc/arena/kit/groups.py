"""Which parameters of a network are trained, and how fast: learning-rate factors by name."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from deepenc.tasks.task import Task

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

Groups = dict[str, float]
"""Parameter name -> factor of its learning rate, as `fit` takes it."""


def of_all(network: nn.Module) -> Groups:
    """All parameters alike."""
    return {name: 1.0 for name, _ in network.named_parameters()}


def of_norms(network: nn.Module) -> Groups:
    """Factors and offsets of the normalisation layers alone."""
    return _of(network, [path for path, module in network.named_modules() if isinstance(module, NORMS)])


def of_head(network: nn.Module, task: Task) -> Groups:
    """The layers alone that make the outputs; empty where there are none."""
    return _of(network, list(task.head(network)))


def norm_scales(network: nn.Module) -> list[str]:
    """Names of the factors γ of BatchNorm layers."""
    return [
        f"{path}.weight" if path else "weight"
        for path, module in network.named_modules()
        if isinstance(module, _NormBase) and module.weight is not None
    ]


def slowed(groups: Groups, network: nn.Module, decay: float) -> Groups:
    """Layer-wise learning rates: each layer learns ``decay`` times as fast as the one after it.

    A layer is a module with a weight matrix or kernel, in the order in which the network registers them;
    normalisations belong to the layer before them.

    Args:
        groups: Factors to start from.
        network: The network.
        decay: In (0, 1]; 1 changes nothing.
    """
    depths: dict[str, int] = {}
    depth = 0
    for path, module in network.named_modules():
        own = list(module.named_parameters(path, recurse=False))
        if any(parameter.ndim > 1 for _, parameter in own):
            depth += 1
        depths |= {name: depth for name, _ in own}
    return {name: factor * decay ** (depth - depths[name]) for name, factor in groups.items()}


def _of(network: nn.Module, paths: list[str]) -> Groups:
    return {name: 1.0 for path in paths for name, _ in network.get_submodule(path).named_parameters(path)}
