"""Operators that mix channels or normalise over them: convolutions, products, norms, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axis, fold
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, drop, rule, unknown


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    transposed: bool = False,
    output_padding: Any = None,
    groups: int = 1,
    *_: Any,
) -> Result:
    axes, where = known.axes, f"{known.where} convolves it with values of fixed width"
    batch, entering = known.value(x).axes[:2]
    first, second = known.value(weight).axes[:2]
    if x.shape[1] == groups > 1:
        made = _depthwise(known, entering, first, outputs[0].shape[1] // groups, transposed, where)
    else:
        # The first dimension of the weight counts over all groups, the second within one.
        if groups > 1:
            entering = fold(axes, entering, groups, where)
            first = fold(axes, first, groups, where)
        made, used = (second, first) if transposed else (first, second)
        axes.role(made, Role.INCOMING)
        axes.role(used, Role.OUTGOING)
        axes.tie(used, entering, where)
        made = None if made is None else np.tile(made, groups)
    if bias is not None:
        added = known.value(bias).axes[0]
        axes.role(added, Role.BIAS)
        made = axes.tie(made, added, f"{known.where} adds a fixed bias")
    return (batch, made, *((None,) * (outputs[0].dim() - 2)))


def _depthwise(
    known: Known, entering: Axis, first: Axis, multiple: int, transposed: bool, where: str
) -> Axis:
    """Each group is one channel, which passes through and comes out as `multiple` channels."""
    known.axes.role(first, Role.INCOMING)
    if transposed:
        passed = known.axes.tie(first, entering, where)
        return None if passed is None else np.repeat(passed, multiple)
    passed = None if entering is None else np.repeat(entering, multiple)
    return known.axes.tie(first, passed, where)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_native_batch_norm_legit", "miopen_batch_norm", "batch_norm")
def _batch_norm(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *_: Any,
) -> Result:
    result = list(known.value(x).axes)
    roles = (Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE)
    for tensor, role in zip((weight, bias, mean, variance), roles, strict=True):
        if isinstance(tensor, Tensor):
            axis = known.value(tensor).axes[0]
            known.axes.role(axis, role)
            result[1] = known.axes.tie(result[1], axis, f"{known.where} normalises with fixed values")
    return tuple(result)


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(known: Known, outputs: list[Tensor], x: Tensor, shape: Sequence[int], *rest: Any) -> Result:
    result = list(known.value(x).axes)
    why = f"{known.where} normalises over it"
    for index in range(len(result) - len(shape), len(result)):
        known.axes.fix(result[index], why)
    for tensor in rest[:2]:
        if isinstance(tensor, Tensor):
            for axis in known.value(tensor).axes:
                known.axes.fix(axis, why)
    return tuple(result)


@rule("native_group_norm", "group_norm")
def _group_norm(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
) -> Result:
    result = list(known.value(x).axes)
    for tensor, role in ((weight, Role.SCALE), (bias, Role.SHIFT)):
        if isinstance(tensor, Tensor):
            axis = known.value(tensor).axes[0]
            known.axes.role(axis, role)
            result[1] = known.axes.tie(result[1], axis, f"{known.where} normalises with fixed values")
    known.axes.fix(result[1], f"{known.where} normalises over groups of it")
    return tuple(result)


@rule("mm", "bmm", "matmul", "mv", "linear")
def _product(known: Known, outputs: list[Tensor], a: Tensor, b: Tensor, *_: Any) -> Result:
    left, right = known.value(a), known.value(b)
    if a.dim() != b.dim() or a.dim() not in (2, 3):
        return unknown(known, "product", (a, b), outputs)
    inner = known.axes.tie(left.axes[-1], right.axes[-2], f"{known.where} multiplies it with fixed values")
    if not left.state and not right.state:
        known.axes.contract(inner)
        _tie_heads(known, left.scores, right.axes[-1])
        known.scores = inner
    for value, used, made in ((right, -2, -1), (left, -1, -2)):
        if value.state:
            known.axes.role(value.axes[used], Role.OUTGOING)
            known.axes.role(value.axes[made], Role.INCOMING)
    batch = tuple(
        known.axes.tie(p, q, f"{known.where} multiplies batches")
        for p, q in zip(left.axes[:-2], right.axes[:-2], strict=True)
    )
    return (*batch, left.axes[-2], right.axes[-1])


def _tie_heads(known: Known, scores: Axis, weighed: Axis) -> None:
    """Give queries, keys and values of a head one width, which most networks keep as one number."""
    if scores is not None and weighed is not None and len(scores) == len(weighed):
        known.axes.tie(scores, weighed, f"{known.where} gives queries and values one width")


@rule("addmm", "baddbmm")
def _added_product(
    known: Known, outputs: list[Tensor], bias: Tensor, a: Tensor, b: Tensor, **_: Any
) -> Result:
    result = _product(known, outputs, a, b)
    value = known.value(bias)
    known.axes.role(value.axes[-1], Role.BIAS)
    tied = known.axes.tie(result[-1], value.axes[-1], f"{known.where} adds a fixed bias")
    return (*result[:-1], tied)


@rule("mean", "sum", "amax", "amin", "var", "std", "prod", "linalg_vector_norm", "any", "all", "logsumexp")
def _reduce(known: Known, outputs: list[Tensor], x: Tensor, *args: Any, dim: Any = None, **_: Any) -> Result:
    lists = [a for a in args if isinstance(a, list | tuple)] + [a for a in args if type(a) is int]
    dims = dim if dim is not None else lists[0] if lists else list(range(x.dim()))
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()
    axes = drop(known, x, sorted(gone), "reduces over it")
    kept = outputs[0].dim() == x.dim()
    return tuple(axis for d, axis in enumerate(axes) if kept or d not in gone)


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "cumsum", "sort")
def _softmax(known: Known, outputs: list[Tensor], x: Tensor, dim: int, *_: Any, **__: Any) -> Result:
    return tuple(drop(known, x, [dim], "normalises over it"))


@rule("embedding")
def _embedding(known: Known, outputs: list[Tensor], weight: Tensor, index: Tensor, *_: Any) -> Result:
    rows, columns = known.value(weight).axes
    known.axes.fix(rows, "it is a vocabulary")
    known.axes.role(columns, Role.INCOMING)
    return (*((None,) * index.dim()), columns)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math")
@rule("scaled_dot_product_attention", "_scaled_dot_product_cudnn_attention")
def _attention(
    known: Known, outputs: list[Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Result:
    asked, answering, weighed = (known.value(tensor).axes[-1] for tensor in (query, key, value))
    inner = known.axes.tie(asked, answering, f"{known.where} multiplies it with fixed values")
    known.axes.contract(inner)
    _tie_heads(known, inner, weighed)
    return (*known.value(query).axes[:-1], known.value(value).axes[-1])
