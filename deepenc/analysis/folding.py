"""Fold BatchNorm into the layers before it: the same function from a network without running statistics."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from deepenc.analysis.following import Run
from deepenc.errors import TraceError
from deepenc.network.guard import first_line
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.tracing.admit import admit

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Folding:
    """A folded network, and what became of every BatchNorm.

    Attributes:
        network: The network, in eval mode; it shares no tensor with the original.
        folded: Path of each BatchNorm that is now an identity, to the path of the layer that took it up.
        left: Path of each BatchNorm that stays, to the reason.
    """

    network: nn.Module
    folded: Mapping[str, str]
    left: Mapping[str, str]


def fold(model: nn.Module, example: Any) -> nn.Module:
    """Fold BatchNorm into the convolutions and linear layers before it.

    The result has no running statistics where it could be folded, and computes what the network computes in
    eval mode, up to rounding. Its tensors are not the network's: what is encrypted and decrypted exactly from
    then on is the folded network. `folding` tells what was folded and what was not.

    Args:
        model: Any network; left as it is.
        example: A tensor, or a tuple (positional) or dict (keywords) of arguments.

    Returns:
        A copy in eval mode.

    Raises:
        TraceError: The network does not run on the example, cannot be copied, or computes something else
            when it is folded.
    """
    made = folding(model, example)
    if made.left:
        told = "; ".join(f"{path}: {reason}" for path, reason in made.left.items())
        log.info("%d BatchNorm layers folded, %d left: %s", len(made.folded), len(made.left), told)
    return made.network


def folding(model: nn.Module, example: Any) -> Folding:
    """Fold as `fold` does, and tell what became of every BatchNorm.

    A BatchNorm is folded where a convolution or linear layer gives its output to it and to nothing else, both
    run once, and neither they nor their tensors are shared or hooked.
    """
    admit(model, example)
    network = replace_tensors(model, {name: t.clone() for name, t in named_tensors(model).items()}).eval()
    run = _run(network, example, "give an example that the network accepts")
    norms = run.norms()
    left = {path: why for path in norms if (why := next(run.objections(path), None)) is not None}
    folded = {path: run.layer_before(path) or "" for path in norms if path not in left}
    for path, before in folded.items():
        absorb(cast(_ConvNd | nn.Linear, network.get_submodule(before)), norms[path])
        network.set_submodule(path, nn.Identity().eval())
    again = _run(network, example, "its own code reads a BatchNorm that is folded; that cannot be done here")
    _check(run.returned, again.returned, type(model).__name__)
    return Folding(network, folded, left)


def absorb(layer: _ConvNd | nn.Linear, norm: _BatchNorm) -> None:
    """Let a layer do what a BatchNorm behind it does in eval mode, in place; computed in float64.

    Args:
        layer: A convolution of any kind or a linear layer; gets a bias if it has none.
        norm: With running statistics; left as it is.
    """
    mean, variance = _exact(norm.running_mean, 0.0), _exact(norm.running_var, 1.0)
    scale = _exact(norm.weight, 1.0) / (variance + norm.eps).sqrt()
    shift = _exact(norm.bias, 0.0) - scale * mean
    rescale(layer, scale, shift)


def rescale(layer: _ConvNd | nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """Multiply a layer's outputs by numbers, and add others, in place; computed in float64.

    Args:
        layer: A convolution of any kind or a linear layer; gets a bias if it has none.
        scale: ``(outputs,)``.
        shift: ``(outputs,)``.
    """
    scale, shift = _exact(scale, 1.0), _exact(shift, 0.0)
    bias = scale * _exact(layer.bias, 0.0) + shift
    weight = _exact(layer.weight, 1.0)
    if isinstance(layer, _ConvNd) and layer.transposed:  # (inputs, outputs of a group, ...), group by group
        blocks = weight.reshape(layer.groups, -1, *weight.shape[1:]).flatten(3)
        weight = (blocks * scale.view(layer.groups, 1, -1, 1)).reshape(weight.shape)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)


def _exact(tensor: Tensor | None, instead: float) -> Tensor:
    """A tensor in float64 on the CPU, where every device's numbers fit; a number where there is none."""
    if tensor is None:
        return torch.tensor(instead, dtype=torch.float64)
    return tensor.detach().to("cpu", torch.float64)


def _run(network: nn.Module, example: Any, remedy: str) -> Run:
    try:
        return Run.of(network, example)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(network).__name__} does not run on the example: {type(error).__name__}: "
            f"{first_line(error)}; {remedy}"
        ) from error


def _check(before: Sequence[Tensor], after: Sequence[Tensor], who: str) -> None:
    """See that the folded network computes the same, up to the root of the precision.

    Raises:
        TraceError: It does not.
    """
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point():
            continue
        size = float(old[old.isfinite()].abs().max()) if old.isfinite().any() else 0.0
        tolerance = math.sqrt(torch.finfo(old.dtype).eps) * (1 + size)
        if old.shape != new.shape or not torch.allclose(old, new, rtol=0, atol=tolerance, equal_nan=True):
            raise TraceError(
                f"{who}, folded, computes something else: expected outputs within {tolerance:.1e} of the "
                f"network's, got {float((old - new).abs().max()):.1e}; it is no function of its input alone, "
                "or too coarse a type: pass it in float32"
            )
