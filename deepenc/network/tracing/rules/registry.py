"""Rules by operator, and the two things a rule may do with what it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.tracing.axes import UNFOLLOWED, Axis
from deepenc.network.tracing.known import Known

Result = tuple[Axis, ...]
One = Callable[..., Result]
Several = Callable[..., list[Result]]

RULES: dict[str, Several] = {}


def rule(*operators: str) -> Callable[[One], One]:
    """Register the rule of operators that return one tensor that matters; in-place variants included."""

    def register(function: One) -> One:
        RULES.update(dict.fromkeys(operators, lambda *args, **kwargs: [function(*args, **kwargs)]))
        return function

    return register


def rule_of_parts(*operators: str) -> Callable[[Several], Several]:
    """Register the rule of operators that return several tensors alike."""

    def register(function: Several) -> Several:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def same(known: Known, outputs: list[Tensor], x: Tensor, **_: Any) -> list[Result]:
    """Each entry stays where it is, or goes to the same place of every result."""
    return [known.value(x).axes] * len(outputs)


def unknown(known: Known, name: str, arguments: Any, outputs: list[Tensor]) -> Result:
    """Fix all axes of an operator's arguments: it is not known what it does to them."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            for axis in known.value(leaf).axes:
                known.axes.fix(axis, f"operator {name} in {known.where} {UNFOLLOWED}")
    return (None,) * outputs[0].dim()


def fix(known: Known, x: Tensor, dims: Sequence[int], why: str) -> list[Axis]:
    """The axes of a tensor, some of them fixed because the operator weighs entries against one another."""
    axes = list(known.value(x).axes)
    for dim in dims:
        known.axes.fix(axes[dim], f"{known.where} {why}")
    return axes


def drop(known: Known, x: Tensor, dims: Sequence[int], why: str) -> list[Axis]:
    """The axes of a tensor without some, which are fixed: the operator picks, cuts, or mixes entries."""
    axes = fix(known, x, dims, why)
    for dim in dims:
        axes[dim] = None
    return axes


def beside(
    known: Known, x: Tensor, dim: int, others: Sequence[Tensor], why: str, *, adds: bool = False
) -> list[Axis]:
    """The axes of a tensor that others go along with in all dimensions but one, where entries are picked.

    Args:
        known: What is known.
        x: The tensor.
        dim: The dimension where entries are picked.
        others: Tensors with as many dimensions.
        why: Why the picked entries cannot be widened.
        adds: Whether activations are added.
    """
    axes = drop(known, x, [dim], why)
    for other in others:
        theirs = drop(known, other, [dim], why)
        active = not known.value(x).state and not known.value(other).state
        for d, axis in enumerate(theirs):
            if d != dim % x.dim() and x.shape[d] == other.shape[d]:
                added = adds and active and other.is_floating_point()
                axes[d] = known.axes.tie(axes[d], axis, f"{known.where} {why}", addition=added)
            else:
                known.axes.fix(axis, f"{known.where} {why}")
                known.axes.fix(axes[d], f"{known.where} {why}")
                axes[d] = None
    return axes
