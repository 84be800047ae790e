"""Operators that move entries: views, slices, concatenations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from deepenc.network.axes import Axis, fold, merge, split
from deepenc.network.rules.registry import Result, drop, rule, rule_of_parts, unknown

if TYPE_CHECKING:
    from deepenc.network.graph import Tracer


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _view(tracer: Tracer, outputs: list[Tensor], x: Tensor, *_: Any) -> Result:
    """Match groups of dimensions with equal products, merge each, and split it anew."""
    axes = tracer.value(x).axes
    where = f"{tracer.where} rearranges it"
    for axis, size in zip(axes, x.shape, strict=True):
        if size == 1:
            tracer.axes.fix(axis, where)
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
        found += split(tracer.axes, merge(tracer.axes, parts, where), sizes, where)
    return tuple(None if size == 1 else found.pop(0) for size in outputs[0].shape)


@rule("permute")
def _permute(tracer: Tracer, outputs: list[Tensor], x: Tensor, dims: Sequence[int]) -> Result:
    axes = tracer.value(x).axes
    return tuple(axes[d] for d in dims)


@rule("transpose", "swapaxes")
def _transpose(tracer: Tracer, outputs: list[Tensor], x: Tensor, a: int, b: int) -> Result:
    axes = list(tracer.value(x).axes)
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


@rule("t")
def _t(tracer: Tracer, outputs: list[Tensor], x: Tensor) -> Result:
    return tracer.value(x).axes[::-1]


@rule("unsqueeze")
def _unsqueeze(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int) -> Result:
    axes = list(tracer.value(x).axes)
    axes.insert(dim % (x.dim() + 1), None)
    return tuple(axes)


@rule("squeeze")
def _squeeze(
    tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int | Sequence[int] | None = None
) -> Result:
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims if x.shape[d] == 1}
    axes = tracer.value(x).axes
    for d in gone:
        tracer.axes.fix(axes[d], f"{tracer.where} drops it")
    return tuple(axis for d, axis in enumerate(axes) if d not in gone)


@rule("expand", "repeat")
def _expand(tracer: Tracer, outputs: list[Tensor], x: Tensor, *_: Any, **__: Any) -> Result:
    shape = outputs[0].shape
    result: list[Axis] = [None] * len(shape)
    for dim in range(-x.dim(), 0):
        axis = tracer.value(x).axes[dim]
        if shape[dim] == x.shape[dim]:
            result[dim] = axis
        else:
            tracer.axes.fix(axis, f"{tracer.where} repeats it")
    return tuple(result)


@rule("select")
def _select(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int, _: int) -> Result:
    axes = drop(tracer, x, [dim], "picks single entries of it")
    del axes[dim]
    return tuple(axes)


@rule_of_parts("unbind")
def _unbind(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int = 0) -> list[Result]:
    axes = drop(tracer, x, [dim], "picks single entries of it")
    del axes[dim]
    return [tuple(axes)] * len(outputs)


@rule("slice")
def _slice(
    tracer: Tracer,
    outputs: list[Tensor],
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Result:
    """One of equal parts, as rotary embeddings cut a head in halves, or take every other; or any cut."""
    axes = list(tracer.value(x).axes)
    axis, size, part = axes[dim], x.shape[dim], outputs[0].shape[dim]
    if axis is None or part == size:
        return tuple(axes)
    first = max(0, min(size, (start or 0) + (size if (start or 0) < 0 else 0)))
    why = f"{tracer.where} cuts it into equal parts"
    if part and size % part == 0 and step == 1 and first % part == 0:
        axes[dim] = fold(tracer.axes, axis, size // part, why)
    elif part * step == size and first < step:
        axes[dim] = fold(tracer.axes, axis.reshape(part, step).T.ravel(), step, why)
    else:
        axes = drop(tracer, x, [dim], "cuts it at a fixed place")
    return tuple(axes)


@rule_of_parts("split", "split_with_sizes", "chunk")
def _split(tracer: Tracer, outputs: list[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[Result]:
    """Parts are widened alike, as multiples of their common divisor; equal ones stay equal."""
    axes = list(tracer.value(x).axes)
    dim %= x.dim()
    sizes = [output.shape[dim] for output in outputs]
    part = math.gcd(*sizes)
    if axes[dim] is not None and (not part or part == 1 < max(sizes)):
        axes = drop(tracer, x, [dim], "cuts it at a fixed place")
    if axes[dim] is None:
        return [tuple(axes)] * len(outputs)
    why = f"{tracer.where} cuts it into equal parts"
    shared = fold(tracer.axes, axes[dim], x.shape[dim] // part, why)
    assert shared is not None
    return [(*axes[:dim], np.tile(shared, size // part), *axes[dim + 1 :]) for size in sizes]


@rule("cat")
def _cat(tracer: Tracer, outputs: list[Tensor], tensors: Sequence[Tensor], dim: int = 0) -> Result:
    tensors = [t for t in tensors if t.shape != (0,)]  # an empty cache concatenates with anything
    if not tensors:
        return (None,)
    result: list[Axis] = list(tracer.value(tensors[0]).axes)
    dim %= len(result)
    pieces = [(tracer.value(t).axes[dim], t.shape[dim]) for t in tensors]
    for tensor in tensors[1:]:
        for d, axis in enumerate(tracer.value(tensor).axes):
            if d != dim:
                result[d] = tracer.axes.tie(result[d], axis, f"{tracer.where} concatenates along another")
    if all(axis is None for axis, _ in pieces):
        result[dim] = None
    else:
        why = f"{tracer.where} concatenates it with values of fixed width"
        result[dim] = np.concatenate(
            [tracer.axes.rigid(size, why) if axis is None else axis for axis, size in pieces]
        )
    return tuple(result)


@rule("constant_pad_nd")
def _pad(tracer: Tracer, outputs: list[Tensor], x: Tensor, pad: Sequence[int], *_: Any) -> Result:
    result = list(tracer.value(x).axes)
    for index in range(len(pad) // 2):
        dim = x.dim() - 1 - index
        before, after = pad[2 * index], pad[2 * index + 1]
        axis = result[dim]
        if axis is not None and (before or after):
            why = f"{tracer.where} pads it by a fixed width"
            if before < 0 or after < 0:
                tracer.axes.fix(axis, why)
                result[dim] = None
            else:
                result[dim] = np.concatenate(
                    [tracer.axes.rigid(before, why), axis, tracer.axes.rigid(after, why)]
                )
    return tuple(result)


@rule("roll")
def _roll(tracer: Tracer, outputs: list[Tensor], x: Tensor, _: Any, dims: Sequence[int] = ()) -> Result:
    return tuple(drop(tracer, x, list(dims) or list(range(x.dim())), "rolls it"))


@rule("index")
def _index(tracer: Tracer, outputs: list[Tensor], x: Tensor, indices: Sequence[Tensor | None]) -> Result:
    """Advanced indexing of adjacent dimensions; the others keep their channels."""
    used = [d for d, index in enumerate(indices) if index is not None]
    axes = drop(tracer, x, used, "picks entries of it")
    if used != list(range(used[0], used[-1] + 1)):
        return unknown(tracer, "index", x, outputs)
    new = outputs[0].dim() - (x.dim() - len(used))
    return (*axes[: used[0]], *((None,) * new), *axes[used[-1] + 1 :])
