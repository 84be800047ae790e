"""What each operator does to the axes: one rule an operator.

A rule gets the tracer and the operator's arguments and returns the axes of the results. An operator
without a rule fixes all axes it touches, so that an unknown operator can cost sites but never exactness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.axes import Axis, fold, merge, split
from deepenc.network.sites import Role

if TYPE_CHECKING:
    from deepenc.network.graph import Tracer

Result = tuple[Axis, ...]
One = Callable[..., Result]
Several = Callable[..., list[Result]]

_rules: dict[str, Several] = {}


def rule(*operators: str) -> Callable[[One], One]:
    """Register the rule of operators that return one tensor that matters; in-place variants included."""

    def register(function: One) -> One:
        _rules.update(dict.fromkeys(operators, lambda *args, **kwargs: [function(*args, **kwargs)]))
        return function

    return register


def rule_of_parts(*operators: str) -> Callable[[Several], Several]:
    """Register the rule of operators that return several tensors alike."""

    def register(function: Several) -> Several:
        _rules.update(dict.fromkeys(operators, function))
        return function

    return register


def apply(
    tracer: Tracer, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> list[Result]:
    """Axes of each tensor that an operator returned.

    Args:
        tracer: Knows the axes of the arguments.
        op: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors it returned.
    """
    if not outputs:
        return []
    name = op.overloadpacket.__name__.removesuffix("_")
    if name in _rules:
        results = _rules[name](tracer, outputs, *args, **kwargs)
    elif torch.Tag.pointwise in op.tags:
        results = [_pointwise(tracer, name, args, outputs)] * len(outputs)
    else:
        results = [_unknown(tracer, name, (args, kwargs), outputs)] * len(outputs)
    # Further results (indices, saved statistics) carry no channels that a network uses.
    return results + [(None,) * extra.dim() for extra in outputs[len(results) :]]


def _unknown(tracer: Tracer, name: str, arguments: Any, outputs: list[Tensor]) -> Result:
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            for axis in tracer.value(leaf).axes:
                tracer.axes.fix(axis, f"operator {name} in {tracer.where} is not followed")
    return (None,) * outputs[0].dim()


_ADDITIONS = {"add", "sub", "rsub"}


def _pointwise(tracer: Tracer, name: str, args: tuple[Any, ...], outputs: list[Tensor]) -> Result:
    """Broadcast all arguments; equal positions are the same channel."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    shape = outputs[0].shape
    result: list[Axis] = [None] * len(shape)
    for dim in range(-len(shape), 0):
        meeting: list[tuple[Axis, bool]] = []
        for tensor in tensors:
            if -dim > tensor.dim():
                continue
            value = tracer.value(tensor)
            if tensor.shape[dim] != shape[dim]:
                tracer.axes.fix(value.axes[dim], f"{tracer.where} broadcasts it")
            else:
                meeting.append((value.axes[dim], value.state))
        result[dim] = _meet(tracer, name, meeting) if meeting else None
    _refuse_own_scale(tracer, name, args, result, shape)
    return tuple(result)


def _meet(tracer: Tracer, name: str, meeting: list[tuple[Axis, bool]]) -> Axis:
    axis = meeting[0][0]
    active = [a for a, state in meeting if not state]
    for other, _ in meeting[1:]:
        axis = tracer.axes.tie(axis, other, f"in {tracer.where} it meets values of fixed width")
    if name in _ADDITIONS and len(active) > 1 and any(a is not active[0] for a in active):
        tracer.axes.mark_stream(axis)
    for other, state in meeting:
        if state and active:
            tracer.axes.role(other, Role.SHIFT if name in _ADDITIONS else Role.SCALE)
    return axis


def _refuse_own_scale(
    tracer: Tracer, name: str, args: tuple[Any, ...], axes: list[Axis], shape: Sequence[int]
) -> None:
    """Fix an axis that is scaled by a power of its own width, as attention scales its heads."""
    factors = [a for a in args if isinstance(a, float)]
    if name not in {"mul", "div"} or not factors or not axes or axes[-1] is None:
        return
    powers = (shape[-1] ** -0.5, shape[-1] ** -0.25, shape[-1] ** 0.5)
    if any(math.isclose(factors[0], power, rel_tol=1e-6) for power in powers) and shape[-1] > 1:
        tracer.axes.fix(axes[-1], f"{tracer.where} scales it by its own width")


@rule("clone", "alias", "detach", "_to_copy", "lift_fresh", "native_dropout", "contiguous")
@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "flip")
@rule("_upsample_bilinear2d_aa", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d")
@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "reflection_pad2d")
@rule("replication_pad2d", "mkldnn_max_pool2d", "max_pool2d", "bernoulli", "fill", "zero")
@rule("hardswish", "hardsigmoid", "mish", "log_sigmoid_forward")
def _same(tracer: Tracer, outputs: list[Tensor], x: Tensor, *_: Any, **__: Any) -> Result:
    return tracer.value(x).axes


@rule("empty", "zeros", "ones", "full", "arange", "scalar_tensor", "linspace", "eye", "rand", "randn")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided")
def _fresh(tracer: Tracer, outputs: list[Tensor], *_: Any, **__: Any) -> Result:
    return (None,) * outputs[0].dim()


@rule("copy")
def _copy(tracer: Tracer, outputs: list[Tensor], x: Tensor, source: Tensor, *_: Any) -> Result:
    return _pointwise(tracer, "copy", (x, source), outputs)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(
    tracer: Tracer,
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
    axes, where = tracer.axes, f"{tracer.where} convolves it with values of fixed width"
    batch, entering = tracer.value(x).axes[:2]
    first, second = tracer.value(weight).axes[:2]
    if x.shape[1] == groups > 1:
        made = _depthwise(tracer, entering, first, outputs[0].shape[1] // groups, transposed, where)
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
        added = tracer.value(bias).axes[0]
        axes.role(added, Role.BIAS)
        made = axes.tie(made, added, f"{tracer.where} adds a fixed bias")
    return (batch, made, *((None,) * (outputs[0].dim() - 2)))


def _depthwise(
    tracer: Tracer, entering: Axis, first: Axis, multiple: int, transposed: bool, where: str
) -> Axis:
    """Each group is one channel, which passes through and comes out as `multiple` channels."""
    tracer.axes.role(first, Role.INCOMING)
    if transposed:
        passed = tracer.axes.tie(first, entering, where)
        return None if passed is None else np.repeat(passed, multiple)
    passed = None if entering is None else np.repeat(entering, multiple)
    return tracer.axes.tie(first, passed, where)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
@rule("_native_batch_norm_legit", "miopen_batch_norm", "batch_norm")
def _batch_norm(
    tracer: Tracer,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *_: Any,
) -> Result:
    result = list(tracer.value(x).axes)
    roles = (Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE)
    for tensor, role in zip((weight, bias, mean, variance), roles, strict=True):
        if isinstance(tensor, Tensor):
            axis = tracer.value(tensor).axes[0]
            tracer.axes.role(axis, role)
            result[1] = tracer.axes.tie(result[1], axis, f"{tracer.where} normalises with fixed values")
    return tuple(result)


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(tracer: Tracer, outputs: list[Tensor], x: Tensor, shape: Sequence[int], *rest: Any) -> Result:
    result = list(tracer.value(x).axes)
    why = f"{tracer.where} normalises over it"
    for index in range(len(result) - len(shape), len(result)):
        tracer.axes.fix(result[index], why)
    for tensor in rest[:2]:
        if isinstance(tensor, Tensor):
            for axis in tracer.value(tensor).axes:
                tracer.axes.fix(axis, why)
    return tuple(result)


@rule("native_group_norm", "group_norm")
def _group_norm(
    tracer: Tracer,
    outputs: list[Tensor],
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
) -> Result:
    result = list(tracer.value(x).axes)
    for tensor, role in ((weight, Role.SCALE), (bias, Role.SHIFT)):
        if isinstance(tensor, Tensor):
            axis = tracer.value(tensor).axes[0]
            tracer.axes.role(axis, role)
            result[1] = tracer.axes.tie(result[1], axis, f"{tracer.where} normalises with fixed values")
    tracer.axes.fix(result[1], f"{tracer.where} normalises over groups of it")
    return tuple(result)


@rule("mm", "bmm", "matmul", "mv", "linear")
def _product(tracer: Tracer, outputs: list[Tensor], a: Tensor, b: Tensor, *_: Any) -> Result:
    left, right = tracer.value(a), tracer.value(b)
    if a.dim() != b.dim() or a.dim() not in (2, 3):
        return _unknown(tracer, "product", (a, b), outputs)
    tracer.axes.tie(left.axes[-1], right.axes[-2], f"{tracer.where} multiplies it with fixed values")
    for value, inner, outer in ((right, -2, -1), (left, -1, -2)):
        if value.state:
            tracer.axes.role(value.axes[inner], Role.OUTGOING)
            tracer.axes.role(value.axes[outer], Role.INCOMING)
    batch = tuple(
        tracer.axes.tie(p, q, f"{tracer.where} multiplies batches")
        for p, q in zip(left.axes[:-2], right.axes[:-2], strict=True)
    )
    return (*batch, left.axes[-2], right.axes[-1])


@rule("addmm", "baddbmm")
def _added_product(
    tracer: Tracer, outputs: list[Tensor], bias: Tensor, a: Tensor, b: Tensor, **_: Any
) -> Result:
    result = _product(tracer, outputs, a, b)
    value = tracer.value(bias)
    tracer.axes.role(value.axes[-1], Role.BIAS)
    tied = tracer.axes.tie(result[-1], value.axes[-1], f"{tracer.where} adds a fixed bias")
    return (*result[:-1], tied)


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


def _drop(tracer: Tracer, x: Tensor, dims: Sequence[int], why: str) -> list[Axis]:
    axes = list(tracer.value(x).axes)
    for dim in dims:
        tracer.axes.fix(axes[dim], f"{tracer.where} {why}")
        axes[dim] = None
    return axes


@rule("select")
def _select(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int, _: int) -> Result:
    axes = _drop(tracer, x, [dim], "picks single entries of it")
    del axes[dim]
    return tuple(axes)


@rule_of_parts("unbind")
def _unbind(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int = 0) -> list[Result]:
    axes = _drop(tracer, x, [dim], "picks single entries of it")
    del axes[dim]
    return [tuple(axes)] * len(outputs)


@rule("slice")
def _slice(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int = 0, *_: Any) -> Result:
    if outputs[0].shape[dim] == x.shape[dim]:
        return tracer.value(x).axes
    return tuple(_drop(tracer, x, [dim], "cuts it at a fixed place"))


@rule_of_parts("split", "split_with_sizes", "chunk")
def _split(tracer: Tracer, outputs: list[Tensor], x: Tensor, _: Any, dim: int = 0) -> list[Result]:
    """Equal parts stay equal when all are widened alike; unequal ones are cut at fixed places."""
    axes = list(tracer.value(x).axes)
    sizes = [output.shape[dim] for output in outputs]
    if axes[dim] is not None and len(set(sizes)) > 1:
        axes = _drop(tracer, x, [dim], "cuts it at a fixed place")
    elif axes[dim] is not None:
        why = f"{tracer.where} cuts it into equal parts"
        axes[dim] = fold(tracer.axes, axes[dim], len(sizes), why)
    return [tuple(axes)] * len(outputs)


@rule("cat")
def _cat(tracer: Tracer, outputs: list[Tensor], tensors: Sequence[Tensor], dim: int = 0) -> Result:
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
    return tuple(_drop(tracer, x, list(dims) or list(range(x.dim())), "rolls it"))


@rule("mean", "sum", "amax", "amin", "var", "std", "prod", "linalg_vector_norm", "any", "all", "logsumexp")
def _reduce(
    tracer: Tracer, outputs: list[Tensor], x: Tensor, *args: Any, dim: Any = None, **_: Any
) -> Result:
    lists = [a for a in args if isinstance(a, list | tuple)] + [a for a in args if type(a) is int]
    dims = dim if dim is not None else lists[0] if lists else list(range(x.dim()))
    gone = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()
    axes = _drop(tracer, x, sorted(gone), "reduces over it")
    kept = outputs[0].dim() == x.dim()
    return tuple(axis for d, axis in enumerate(axes) if kept or d not in gone)


@rule("_softmax", "_safe_softmax", "_log_softmax", "softmax", "cumsum", "sort")
def _softmax(tracer: Tracer, outputs: list[Tensor], x: Tensor, dim: int, *_: Any, **__: Any) -> Result:
    return tuple(_drop(tracer, x, [dim], "normalises over it"))


@rule("embedding")
def _embedding(tracer: Tracer, outputs: list[Tensor], weight: Tensor, index: Tensor, *_: Any) -> Result:
    rows, columns = tracer.value(weight).axes
    tracer.axes.fix(rows, "it is a vocabulary")
    tracer.axes.role(columns, Role.INCOMING)
    return (*((None,) * index.dim()), columns)


@rule("index")
def _index(tracer: Tracer, outputs: list[Tensor], x: Tensor, indices: Sequence[Tensor | None]) -> Result:
    """Advanced indexing of adjacent dimensions; the others keep their channels."""
    used = [d for d, index in enumerate(indices) if index is not None]
    axes = _drop(tracer, x, used, "picks entries of it")
    if used != list(range(used[0], used[-1] + 1)):
        return _unknown(tracer, "index", x, outputs)
    new = outputs[0].dim() - (x.dim() - len(used))
    return (*axes[: used[0]], *((None,) * new), *axes[used[-1] + 1 :])


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
@rule("_scaled_dot_product_flash_attention", "_scaled_dot_product_attention_math")
@rule("scaled_dot_product_attention", "_scaled_dot_product_cudnn_attention")
def _attention(
    tracer: Tracer, outputs: list[Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Result:
    for tensor in (query, key):
        tracer.axes.fix(tracer.value(tensor).axes[-1], f"{tracer.where} scales it by its own width")
    return (*tracer.value(query).axes[:-1], tracer.value(value).axes[-1])
