"""Operators that keep each entry where it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axis, fold
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, rule, rule_of_parts, same

_ADDITIONS = {"add", "sub", "rsub"}


def pointwise(known: Known, name: str, args: Any, outputs: list[Tensor]) -> Result:
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


rule_of_parts("clone", "alias", "detach", "_to_copy", "lift_fresh", "native_dropout", "contiguous")(same)
rule_of_parts("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")(same)
rule_of_parts("bernoulli", "fill", "zero", "hardswish", "hardsigmoid", "mish", "log_sigmoid_forward")(same)
rule_of_parts("rrelu_with_noise", "fake_quantize_per_tensor_affine_cachemask")(same)


@rule("empty", "zeros", "ones", "full", "scalar_tensor", "empty_strided")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def _equal(known: Known, outputs: list[Tensor], *_: Any, **__: Any) -> Result:
    """All entries are equal, or are to be written yet: there may be as many as what they meet has."""
    known.state = True
    return tuple(known.axes.loose(size) if size > 1 else None for size in outputs[0].shape)


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "tril_indices", "triu_indices")
def _counted(known: Known, outputs: list[Tensor], *_: Any, **__: Any) -> Result:
    return (None,) * outputs[0].dim()


@rule("copy")
def _copy(known: Known, outputs: list[Tensor], x: Tensor, src: Tensor, **_: Any) -> Result:
    return pointwise(known, "copy", (x, src), outputs)


@rule("_prelu_kernel")
def _prelu(known: Known, outputs: list[Tensor], x: Tensor, weight: Tensor) -> Result:
    return pointwise(known, "prelu", (x, weight), outputs)


@rule_of_parts("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams")
def _fake_quantize(
    known: Known, outputs: list[Tensor], x: Tensor, scale: Tensor, zero_point: Tensor, **_: Any
) -> list[Result]:
    return [pointwise(known, "fake_quantize", (x, scale, zero_point), outputs)] * len(outputs)


@rule("glu")
def _glu(known: Known, outputs: list[Tensor], x: Tensor, dim: int = -1) -> Result:
    """One half is multiplied by a gate that the other makes."""
    axes = list(known.value(x).axes)
    axes[dim] = fold(known.axes, axes[dim], 2, f"{known.where} cuts it into equal parts")
    return tuple(axes)
