"""Products of matrices: linear layers and attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axis
from deepenc.network.tracing.known import Known, Value
from deepenc.network.tracing.rules.registry import Result, rule


@rule("mm", "bmm")
def _product(known: Known, outputs: list[Tensor], a: Tensor, mat2: Tensor, **_: Any) -> Result:
    left, right = known.value(a), known.value(mat2)
    inner = known.axes.tie(left.axes[-1], right.axes[-2], f"{known.where} multiplies it with fixed values")
    if not left.state and not right.state:
        known.axes.contract(inner)
        _tie_heads(known, left.scores, right.axes[-1])
        known.scores = inner
    for value, used, made in ((left, -1, -2), (right, -2, -1)):
        _weigh(known, value, used, made)
    known.state = False
    batch = tuple(
        known.axes.tie(p, q, f"{known.where} multiplies batches")
        for p, q in zip(left.axes[:-2], right.axes[:-2], strict=True)
    )
    return (*batch, left.axes[-2], right.axes[-1])


def _weigh(known: Known, value: Value, used: int, made: int) -> None:
    """Weights carry on the channels that are summed over, and make others."""
    if value.state:
        known.axes.role(value.axes[used], Role.OUTGOING)
        known.axes.role(value.axes[made], Role.INCOMING)


def _tie_heads(known: Known, scores: Axis, weighed: Axis) -> None:
    """Give queries, keys and values of a head one width, which most networks keep as one number."""
    if scores is not None and weighed is not None and len(scores) == len(weighed):
        known.axes.tie(scores, weighed, f"{known.where} gives queries and values one width")


@rule("addmm")
def _addmm(known: Known, outputs: list[Tensor], bias: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Result:
    return _added_product(known, outputs, bias, mat1, mat2)


@rule("baddbmm")
def _baddbmm(
    known: Known, outputs: list[Tensor], bias: Tensor, batch1: Tensor, batch2: Tensor, **_: Any
) -> Result:
    return _added_product(known, outputs, bias, batch1, batch2)


def _added_product(known: Known, outputs: list[Tensor], bias: Tensor, a: Tensor, b: Tensor) -> Result:
    result = list(_product(known, outputs, a, b))
    value, why = known.value(bias), f"{known.where} adds a fixed bias"
    for dim in range(-bias.dim(), 0):
        if bias.shape[dim] != outputs[0].shape[dim]:
            known.axes.fix(value.axes[dim], f"{known.where} broadcasts it")
            continue
        if value.state:
            known.axes.role(value.axes[dim], Role.BIAS)
        result[dim] = known.axes.tie(result[dim], value.axes[dim], why, addition=not value.state)
    return tuple(result)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention")
@rule("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math")
def _attention(
    known: Known,
    outputs: list[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    **_: Any,
) -> Result:
    asked, answering, weighed = (known.value(tensor) for tensor in (query, key, value))
    why = f"{known.where} multiplies it with fixed values"
    inner = known.axes.tie(asked.axes[-1], answering.axes[-1], why)
    known.axes.contract(inner)
    _tie_heads(known, inner, weighed.axes[-1])
    for each, used, made in ((asked, -1, -2), (answering, -1, -2), (weighed, -2, -1)):
        _weigh(known, each, used, made)
    known.state = False
    for each in (asked, answering, weighed):
        known.axes.fix(each.axes[-2], f"{known.where} normalises over it")
    batch = list(asked.axes[:-2])
    for tensor in (key, value, attn_mask, attn_bias):
        axes = () if tensor is None else known.value(tensor).axes
        for dim in range(-len(axes), -2):
            why = f"{known.where} multiplies batches"
            if tensor is not None and tensor.shape[dim] == query.shape[dim]:
                batch[dim + 2] = known.axes.tie(batch[dim + 2], axes[dim], why)
            else:
                known.axes.fix(axes[dim], why)
                known.axes.fix(batch[dim + 2], why)
        if tensor is attn_mask or tensor is attn_bias:
            for axis in axes[-2:]:
                known.axes.fix(axis, f"{known.where} normalises over it")
    return (*batch, None, weighed.axes[-1])
