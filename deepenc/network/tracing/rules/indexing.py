"""Operators that pick entries by number, or put them where numbers say: lookups, gathers, scatters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepenc.network.tracing.axes import Axis
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.pointwise import pointwise
from deepenc.network.tracing.rules.registry import Result, beside, drop, rule, unknown


@rule("select")
def _select(known: Known, outputs: list[Tensor], x: Tensor, dim: int, **_: Any) -> Result:
    axes = drop(known, x, [dim], "picks single entries of it")
    del axes[dim]
    return tuple(axes)


@rule("index_select", "index_fill")
def _index_select(known: Known, outputs: list[Tensor], x: Tensor, dim: int, **_: Any) -> Result:
    return tuple(drop(known, x, [dim], "picks entries of it"))


@rule("gather")
def _gather(known: Known, outputs: list[Tensor], x: Tensor, dim: int, index: Tensor, **_: Any) -> Result:
    return tuple(beside(known, index, dim, [x], "picks entries of it"))


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor | None = None,
    **_: Any,
) -> Result:
    others = [tensor for tensor in (index, src) if tensor is not None]
    return tuple(beside(known, x, dim, others, "puts entries of it at given places", adds=True))


@rule("index_add", "index_copy", "index_reduce")
def _index_add(known: Known, outputs: list[Tensor], x: Tensor, dim: int, source: Tensor, **_: Any) -> Result:
    return tuple(beside(known, x, dim, [source], "puts entries of it at given places", adds=True))


@rule("index", "_unsafe_index")
def _index(known: Known, outputs: list[Tensor], x: Tensor, indices: Sequence[Tensor | None]) -> Result:
    axes = _picked(known, x, indices, outputs[0].dim())
    return unknown(known, "index", x, outputs) if axes is None else tuple(axes)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(
    known: Known, outputs: list[Tensor], x: Tensor, indices: Sequence[Tensor | None], values: Tensor, **_: Any
) -> Result:
    (mask,) = indices if len(indices) == 1 else (None,)
    if mask is not None and mask.shape == x.shape and values.numel() == 1:
        return pointwise(known, "masked_fill", (x, mask), outputs)
    used = _used(indices)
    given = max(1 if _masks(index) else index.dim() for index in indices if index is not None)
    axes = _picked(known, x, indices, x.dim() - len(used) + given)
    if axes is None:
        return unknown(known, "index_put", (x, values), outputs)
    kept = [d for d in range(x.dim()) if d not in used]
    shape = [x.shape[d] for d in kept[: used[0]]] + [0] * given + [x.shape[d] for d in kept[used[0] :]]
    result: list[Axis] = list(known.value(x).axes)
    for d in used:
        result[d] = None
    theirs = known.value(values).axes
    why = f"{known.where} puts it at given places"
    for dim in range(-values.dim(), 0):
        if axes[dim] is not None and values.shape[dim] == shape[dim]:
            place = kept[dim + len(axes) - (given if dim + len(axes) >= used[0] else 0)]
            result[place] = known.axes.tie(axes[dim], theirs[dim], why)
        else:
            known.axes.fix(theirs[dim], why)
            if axes[dim] is not None and values.shape[dim] != 1:
                return unknown(known, "index_put", (x, values), outputs)
    return tuple(result)


def _masks(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _used(indices: Sequence[Tensor | None]) -> list[int]:
    """The dimensions that are indexed; a mask indexes as many as it has."""
    used: list[int] = []
    dim = 0
    for index in indices:
        count = index.dim() if index is not None and _masks(index) else 1
        used += [] if index is None else range(dim, dim + count)
        dim += count
    return used


def _picked(known: Known, x: Tensor, indices: Sequence[Tensor | None], size: int) -> list[Axis] | None:
    """The axes of what is indexed, where adjacent dimensions are; the others keep their channels."""
    used = _used(indices)
    axes = drop(known, x, used, "picks entries of it")
    for index in indices:
        for axis in () if index is None else known.value(index).axes:
            known.axes.fix(axis, f"{known.where} picks entries by it")
    if used != list(range(used[0], used[-1] + 1)):
        return None
    return [*axes[: used[0]], *((None,) * (size - x.dim() + len(used))), *axes[used[-1] + 1 :]]
