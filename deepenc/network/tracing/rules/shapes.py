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
def _view(known: Known, outputs: list[Tensor], x: Tensor, size: Any = None, **_: Any) -> Result:
    """Match groups of dimensions with equal products, merge each, and split it again."""
    axes, where = known.value(x).axes, f"{known.where} rearranges it"
    if size is None or not x.numel():  # other bits of the same memory; nothing, in any shape
        return unknown(known, "view", x, outputs)
    for axis, length in zip(axes, x.shape, strict=True):
        if length == 1:
            known.axes.fix(axis, where)
    # Dimensions of size 1 carry nothing; leave them out of the matching.
    old = [(axis, length) for axis, length in zip(axes, x.shape, strict=True) if length != 1]
    new = [length for length in outputs[0].shape if length != 1]
    found: list[Axis] = []
    while new:
        parts, sizes = [old.pop(0)], [new.pop(0)]
        while (have := math.prod(s for _, s in parts)) != (want := math.prod(sizes)):
            if have < want:
                parts.append(old.pop(0))
            else:
                sizes.append(new.pop(0))
        found += split(known.axes, merge(known.axes, parts, where), sizes, where)
    return tuple(None if length == 1 else found.pop(0) for length in outputs[0].shape)


@rule("as_strided")
def _as_strided(known: Known, outputs: list[Tensor], x: Tensor, **_: Any) -> Result:
    """Dimensions in another order, and with others of size 1 among them, are known by their strides."""
    made, axes = outputs[0], known.value(x).axes
    theirs, ours = ({t.stride(d): d for d in range(t.dim()) if t.shape[d] > 1} for t in (x, made))
    same = theirs.keys() == ours.keys() and all(x.shape[theirs[s]] == made.shape[ours[s]] for s in ours)
    if not same or made.numel() != x.numel() or made.storage_offset() != x.storage_offset():
        return unknown(known, "as_strided", x, outputs)
    for axis, size in zip(axes, x.shape, strict=True):
        if size == 1:
            known.axes.fix(axis, f"{known.where} rearranges it")
    result: list[Axis] = [None] * made.dim()
    for stride, dim in ours.items():
        result[dim] = axes[theirs[stride]]
    return tuple(result)


@rule("view_as_complex")
def _view_as_complex(known: Known, outputs: list[Tensor], x: Tensor) -> Result:
    return tuple(drop(known, x, [-1], "makes complex numbers of it")[:-1])


@rule("view_as_real")
def _view_as_real(known: Known, outputs: list[Tensor], x: Tensor) -> Result:
    return (*known.value(x).axes, None)


@rule("permute")
def _permute(known: Known, outputs: list[Tensor], x: Tensor, dims: Sequence[int]) -> Result:
    axes = known.value(x).axes
    return tuple(axes[d] for d in dims)


@rule("transpose", "swapaxes")
def _transpose(known: Known, outputs: list[Tensor], x: Tensor, dim0: int, dim1: int) -> Result:
    axes = list(known.value(x).axes)
    if axes:
        axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
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


@rule("expand")
def _expand(known: Known, outputs: list[Tensor], x: Tensor, **_: Any) -> Result:
    """A dimension of copies has any width that it meets."""
    shape = outputs[0].shape
    result: list[Axis] = [known.axes.loose(size) if size > 1 else None for size in shape]
    for dim in range(-x.dim(), 0):
        axis = known.value(x).axes[dim]
        if shape[dim] == x.shape[dim]:
            result[dim] = axis
        else:
            known.axes.fix(axis, f"{known.where} repeats it")
    return tuple(result)


@rule("repeat")
def _repeat(known: Known, outputs: list[Tensor], x: Tensor, repeats: Sequence[int]) -> Result:
    """All entries of a dimension, then all of them again."""
    shape = outputs[0].shape
    result: list[Axis] = [known.axes.loose(size) if size > 1 else None for size in shape]
    for dim in range(-x.dim(), 0):
        axis = known.value(x).axes[dim]
        if x.shape[dim] > 1 or repeats[dim] == 1:
            result[dim] = None if axis is None else np.tile(axis, repeats[dim])
        else:
            known.axes.fix(axis, f"{known.where} repeats it")
    return tuple(result)


@rule("unfold")
def _unfold(known: Known, outputs: list[Tensor], x: Tensor, dimension: int, **_: Any) -> Result:
    return (*drop(known, x, [dimension], "slides over it"), None)


@rule_of_parts("unbind")
def _unbind(known: Known, outputs: list[Tensor], x: Tensor, dim: int = 0) -> list[Result]:
    axes = drop(known, x, [dim], "picks single entries of it")
    del axes[dim]
    return [tuple(axes)] * len(outputs)


@rule("stack")
def _stack(known: Known, outputs: list[Tensor], tensors: Sequence[Tensor], dim: int = 0) -> Result:
    axes = _alike(known, tensors, f"{known.where} stacks it with others")
    axes.insert(dim % (len(axes) + 1), None)
    return tuple(axes)


def _alike(known: Known, tensors: Sequence[Tensor], why: str, other_than: int | None = None) -> list[Axis]:
    """The axes of tensors that lie beside one another."""
    result: list[Axis] = list(known.value(tensors[0]).axes)
    for tensor in tensors[1:]:
        for d, axis in enumerate(known.value(tensor).axes):
            if d != other_than:
                result[d] = known.axes.tie(result[d], axis, why)
    return result


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


@rule_of_parts("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def _split(known: Known, outputs: list[Tensor], x: Tensor, dim: int = 0, **_: Any) -> list[Result]:
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
    dim %= tensors[0].dim()
    pieces = [(known.value(t).axes[dim], t.shape[dim]) for t in tensors]
    result = _alike(known, tensors, f"{known.where} concatenates along another", dim)
    if all(axis is None for axis, _ in pieces):
        result[dim] = None
    else:
        why = f"{known.where} concatenates it with values of fixed width"
        result[dim] = np.concatenate(
            [known.axes.rigid(size, why) if axis is None else axis for axis, size in pieces]
        )
    return tuple(result)


@rule("constant_pad_nd")
def _pad(known: Known, outputs: list[Tensor], x: Tensor, pad: Sequence[int], **_: Any) -> Result:
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


@rule("roll", "flip", "rot90")
def _roll(known: Known, outputs: list[Tensor], x: Tensor, dims: Sequence[int] = (), **_: Any) -> Result:
    return tuple(drop(known, x, list(dims) or list(range(x.dim())), "moves entries along it"))
