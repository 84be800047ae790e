"""Operators that move entries: views, slices, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from deepenc.network.tracing.axes import Axis, fold, merge, split
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, drop, rule, rule_of_parts, unknown


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(known: Known, outputs: list[Tensor], x: Tensor, *_: Any) -> Result:
    """Match groups of dimensions with equal products, merge each, and split it anew."""
    axes = known.value(x).axes
    where = f"{known.where} rearranges it"
    for axis, size in zip(axes, x.shape, strict=True):
        if size == 1:
            known.axes.fix(axis, where)
    # Dimensions of size 1 carry nothing; leave them out of the matching.
    old = [(axis, size) for axis, size in zip(axes, x.shape, strict=True) if size != 1]
    new = [size for size in outputs[0].shape if size != 1]
    found: list[Axis] = []
    while new:
        parts, sizes = [old.pop(0)], [new.pop(0)]
        while (have := math.prod(s for _, s in parts)) != (want := math.prod(sizes)):
            if have < want:
                parts.append(old.pop(0))
            else:
                sizes.append(new.pop(0))
        found += split(known.axes, merge(known.axes, parts, where), sizes, where)
    return tuple(None if size == 1 else found.pop(0) for size in outputs[0].shape)


@rule("permute")
def _permute(known: Known, outputs: list[Tensor], x: Tensor, dims: Sequence[int]) -> Result:
    axes = known.value(x).axes
    return tuple(axes[d] for d in dims)


@rule("transpose", "swapaxes")
def _transpose(known: Known, outputs: list[Tensor], x: Tensor, a: int, b: int) -> Result:
    axes = list(known.value(x).axes)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule("t")
def _t(known: Known, outputs: list[Tensor], x: Tensor) -> Result:
    return known.value(x).axes[::-1]


@rule("unsqueeze")
def _unsqueeze(known: Known, outputs: list[Tensor], x: Tensor, dim: int) -> Result:
    axes = list(known.value(x).axes)
    axes.insert(dim % (x.dim() + 1), None)
    return tuple(axes)


@rule("squeeze")
def _squeeze(
    known: Known, outputs: list[Tensor], x: Tensor, dim: int | Sequence[int] | None = None
) -> Result:
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims if x.shape[d] == 1}
    axes = known.value(x).axes
    for d in gone:
        known.axes.fix(axes[d], f"{known.where} drops it")
    return tuple(axis for d, axis in enumerate(axes) if d not in gone)


@rule("expand", "repeat")
def _expand(known: Known, outputs: list[Tensor], x: Tensor, *_: Any, **__: Any) -> Result:
    shape = outputs[0].shape
    result: list[Axis] = [None] * len(shape)
    for dim in range(-x.dim(), 0):
        axis = known.value(x).axes[dim]
        if shape[dim] == x.shape[dim]:
            result[dim] = axis
        else:
            known.axes.fix(axis, f"{known.where} repeats it")
    return tuple(result)


@rule("select")
def _select(known: Known, outputs: list[Tensor], x: Tensor, dim: int, _: int) -> Result:
    axes = drop(known, x, [dim], "picks single entries of it")
    del axes[dim]
    return tuple(axes)


@rule_of_parts("unbind")
def _unbind(known: Known, outputs: list[Tensor], x: Tensor, dim: int = 0) -> list[Result]:
    axes = drop(known, x, [dim], "picks single entries of it")
    del axes[dim]
    return [tuple(axes)] * len(outputs)


@rule("slice")
def _slice(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Result:
    """One of equal parts, as rotary embeddings cut a head in halves, or take every other; or any cut."""
    axes = list(known.value(x).axes)
    axis, size, part = axes[dim], x.shape[dim], outputs[0].shape[dim]
    if axis is None or part == size:
        return tuple(axes)
    first = max(0, min(size, (start or 0) + (size if (start or 0) < 0 else 0)))
    why = f"{known.where} cuts it into equal parts"
    if part and size % part == 0 and step == 1 and first % part == 0:
        axes[dim] = fold(known.axes, axis, size // part, why)
    elif part * step == size and first < step:
        axes[dim] = fold(known.axes, axis.reshape(part, step).T.ravel(), step, why)
    else:
        axes = drop(known, x, [dim], "cuts it at a fixed place")
    return tuple(axes)


@rule_of_parts("split", "split_with_sizes", "chunk")
def _split(known: Known, outputs: list[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[Result]:
    """Parts are widened alike, as multiples of their common divisor; equal ones stay equal."""
    axes = list(known.value(x).axes)
    dim %= x.dim()
    sizes = [output.shape[dim] for output in outputs]
    part = math.gcd(*sizes)
    if axes[dim] is not None and (not part or part == 1 < max(sizes)):
        axes = drop(known, x, [dim], "cuts it at a fixed place")
    if axes[dim] is None:
        return [tuple(axes)] * len(outputs)
    why = f"{known.where} cuts it into equal parts"
    shared = fold(known.axes, axes[dim], x.shape[dim] // part, why)
    assert shared is not None
    return [(*axes[:dim], np.tile(shared, size // part), *axes[dim + 1 :]) for size in sizes]


@rule("cat")
def _cat(known: Known, outputs: list[Tensor], tensors: Sequence[Tensor], dim: int = 0) -> Result:
    tensors = [t for t in tensors if t.shape != (0,)]  # an empty cache concatenates with anything
    if not tensors:
        return (None,)
    result: list[Axis] = list(known.value(tensors[0]).axes)
    dim %= len(result)
    pieces = [(known.value(t).axes[dim], t.shape[dim]) for t in tensors]
    for tensor in tensors[1:]:
        for d, axis in enumerate(known.value(tensor).axes):
            if d != dim:
                result[d] = known.axes.tie(result[d], axis, f"{known.where} concatenates along another")
    if all(axis is None for axis, _ in pieces):
        result[dim] = None
    else:
        why = f"{known.where} concatenates it with values of fixed width"
        result[dim] = np.concatenate(
            [known.axes.rigid(size, why) if axis is None else axis for axis, size in pieces]
        )
    return tuple(result)


@rule("constant_pad_nd")
def _pad(known: Known, outputs: list[Tensor], x: Tensor, pad: Sequence[int], *_: Any) -> Result:
    result = list(known.value(x).axes)
    for index in range(len(pad) // 2):
        dim = x.dim() - 1 - index
        before, after = pad[2 * index], pad[2 * index + 1]
        axis = result[dim]
        if axis is not None and (before or after):
            why = f"{known.where} pads it by a fixed width"
            if before < 0 or after < 0:
                known.axes.fix(axis, why)
                result[dim] = None
            else:
                result[dim] = np.concatenate(
                    [known.axes.rigid(before, why), axis, known.axes.rigid(after, why)]
                )
    return tuple(result)


@rule("roll")
def _roll(known: Known, outputs: list[Tensor], x: Tensor, _: Any, dims: Sequence[int] = ()) -> Result:
    return tuple(drop(known, x, list(dims) or list(range(x.dim())), "rolls it"))


@rule("index")
def _index(known: Known, outputs: list[Tensor], x: Tensor, indices: Sequence[Tensor | None]) -> Result:
    """Advanced indexing of adjacent dimensions; the others keep their channels."""
    used = [d for d, index in enumerate(indices) if index is not None]
    axes = drop(known, x, used, "picks entries of it")
    if used != list(range(used[0], used[-1] + 1)):
        return unknown(known, "index", x, outputs)
    new = outputs[0].dim() - (x.dim() - len(used))
    return (*axes[: used[0]], *((None,) * new), *axes[used[-1] + 1 :])
