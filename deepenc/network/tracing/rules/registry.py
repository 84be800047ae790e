"""Rules by operator, and the two things a rule may do with what it cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.tracing.axes import Axis
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


def unknown(known: Known, name: str, arguments: Any, outputs: list[Tensor]) -> Result:
    """Fix all axes of an operator's arguments: it is not known what it does to them."""
    for leaf in tree_leaves(arguments):
        if isinstance(leaf, Tensor):
            for axis in known.value(leaf).axes:
                known.axes.fix(axis, f"operator {name} in {known.where} is not followed")
    return (None,) * outputs[0].dim()


def drop(known: Known, x: Tensor, dims: Sequence[int], why: str) -> list[Axis]:
    """The axes of a tensor, some of them fixed because the operator picks, cuts, or mixes entries."""
    axes = list(known.value(x).axes)
    for dim in dims:
        known.axes.fix(axes[dim], f"{known.where} {why}")
        axes[dim] = None
    return axes
