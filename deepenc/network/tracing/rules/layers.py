"""Layers with weights: convolutions, normalisations, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axis, fold
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, drop, fix, rule


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    transposed: bool = False,
    **_: Any,
) -> Result:
    axes, where = known.axes, f"{known.where} convolves it with values of fixed width"
    batch, entering = drop(known, x, range(2, x.dim()), "slides over it")[:2]
    first, second = drop(known, weight, range(2, x.dim()), "slides it over others")[:2]
    constant = known.value(weight).state
    if x.shape[1] == groups > 1:
        if constant:
            axes.role(first, Role.INCOMING)
        made = _depthwise(known, entering, first, outputs[0].shape[1] // groups, transposed, where)
    else:
        # The first dimension of the weight counts over all groups, the second within one.
        if groups > 1:
            entering = fold(axes, entering, groups, where)
            first = fold(axes, first, groups, where)
        made, used = (second, first) if transposed else (first, second)
        if constant:
            axes.role(made, Role.INCOMING)
            axes.role(used, Role.OUTGOING)
        inner = axes.tie(used, entering, where)
        if not constant:
            axes.contract(inner)
        made = None if made is None else np.tile(made, groups)
    known.state = False
    if bias is not None:
        added = known.value(bias).axes[0]
        axes.role(added, Role.BIAS)
        made = axes.tie(made, added, f"{known.where} adds a fixed bias")
    return (batch, made, *((None,) * (outputs[0].dim() - 2)))


@rule("deform_conv2d")
def _deformed(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    groups: int,
    **_: Any,
) -> Result:
    for tensor in (offset, mask):
        drop(known, tensor, range(tensor.dim()), "moves others by it")
    return _convolution(known, outputs, x, weight, bias, groups)


def _depthwise(
    known: Known, entering: Axis, first: Axis, multiple: int, transposed: bool, where: str
) -> Axis:
    """Each group is one channel, which passes through and comes out as `multiple` channels."""
    if transposed:
        passed = known.axes.tie(first, entering, where)
        return None if passed is None else np.repeat(passed, multiple)
    passed = None if entering is None else np.repeat(entering, multiple)
    return known.axes.tie(first, passed, where)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_native_batch_norm_legit", "miopen_batch_norm", "_batch_norm_with_update")
@rule("_batch_norm_with_update_functional", "_batch_norm_no_update")
def _batch_norm(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    **_: Any,
) -> Result:
    others = [d for d in range(x.dim()) if d != 1] if training else []
    result = fix(known, x, others, "normalises over it")
    roles = (Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE)
    for tensor, role in zip((weight, bias, running_mean, running_var), roles, strict=True):
        if tensor is not None:
            axis = known.value(tensor).axes[0]
            known.axes.role(axis, role)
            result[1] = known.axes.tie(result[1], axis, f"{known.where} normalises with fixed values")
    return tuple(result)


@rule("_weight_norm_interface")
def _weight_norm(known: Known, outputs: list[Tensor], v: Tensor, g: Tensor, dim: int) -> Result:
    """Each slice of weights is divided by its norm, which zeros leave as it is."""
    axes = list(known.value(v).axes)
    for place, axis in enumerate(axes):
        known.axes.role(axis, Role.INCOMING if place == dim else Role.OUTGOING)
    known.axes.role(known.value(g).axes[dim], Role.SCALE)
    axes[dim] = known.axes.tie(axes[dim], known.value(g).axes[dim], f"{known.where} scales it")
    return tuple(axes)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Result:
    for tensor in (weight, bias):
        if tensor is not None:
            fix(known, tensor, range(tensor.dim()), "normalises over it")
    return tuple(fix(known, x, range(-len(normalized_shape), 0), "normalises over it"))


@rule("native_group_norm")
def _group_norm(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **_: Any,
) -> Result:
    for tensor in (weight, bias):
        if tensor is not None:
            fix(known, tensor, [0], "normalises over groups of it")
    return tuple(fix(known, x, range(1, x.dim()), "normalises over groups of it"))


@rule("embedding")
def _embedding(known: Known, outputs: list[Tensor], weight: Tensor, indices: Tensor, **_: Any) -> Result:
    rows, columns = known.value(weight).axes
    known.axes.fix(rows, "it is a vocabulary")
    known.axes.role(columns, Role.INCOMING)
    return (*known.value(indices).axes, columns)
