"""Operators that keep each entry where it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axis
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, rule

_ADDITIONS = {"add", "sub", "rsub"}


def pointwise(known: Known, name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> Result:
    """Broadcast all arguments; equal positions are the same channel."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    shape = outputs[0].shape
    result: list[Axis] = [None] * len(shape)
    for dim in range(-len(shape), 0):
        meeting: list[tuple[Axis, bool]] = []
        for tensor in tensors:
            if -dim > tensor.dim():
                continue
            value = known.value(tensor)
            if tensor.shape[dim] != shape[dim]:
                known.axes.fix(value.axes[dim], f"{known.where} broadcasts it")
            else:
                meeting.append((value.axes[dim], value.state))
        result[dim] = _meet(known, name, meeting) if meeting else None
    return tuple(result)


def _meet(known: Known, name: str, meeting: list[tuple[Axis, bool]]) -> Axis:
    axis = meeting[0][0]
    active = [a for a, state in meeting if not state]
    adds = name in _ADDITIONS and len(active) > 1
    for other, _ in meeting[1:]:
        why = f"in {known.where} it meets values of fixed width"
        axis = known.axes.tie(axis, other, why, addition=adds)
    for other, state in meeting:
        if state and active:
            known.axes.role(other, Role.SHIFT if name in _ADDITIONS else Role.SCALE)
    return axis


@rule("clone", "alias", "detach", "_to_copy", "lift_fresh", "native_dropout", "contiguous")
@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "flip")
@rule("_upsample_bilinear2d_aa", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d")
@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "reflection_pad2d")
@rule("replication_pad2d", "mkldnn_max_pool2d", "max_pool2d", "bernoulli", "fill", "zero")
@rule("hardswish", "hardsigmoid", "mish", "log_sigmoid_forward")
def _same(known: Known, outputs: list[Tensor], x: Tensor, *_: Any, **__: Any) -> Result:
    return known.value(x).axes


@rule("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "linspace", "eye", "rand", "randn")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided")
def _fresh(known: Known, outputs: list[Tensor], *_: Any, **__: Any) -> Result:
    return (None,) * outputs[0].dim()


@rule("copy")
def _copy(known: Known, outputs: list[Tensor], x: Tensor, source: Tensor, *_: Any) -> Result:
    return pointwise(known, "copy", (x, source), outputs)
