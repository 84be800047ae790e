"""What each operator does to the axes: one rule an operator.

A rule gets the tracer, the tensors that the operator returned and its arguments, and returns the axes of
the results. An operator without a rule fixes all axes it touches, so that an unknown operator can cost
sites but never exactness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepenc.network.rules import layers, shapes  # registers their rules
from deepenc.network.rules.pointwise import pointwise
from deepenc.network.rules.registry import RULES, Result, unknown

if TYPE_CHECKING:
    from deepenc.network.graph import Tracer

__all__ = ["apply", "layers", "shapes"]


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
    if name in RULES:
        results = RULES[name](tracer, outputs, *args, **kwargs)
    elif torch.Tag.pointwise in op.tags:
        results = [pointwise(tracer, name, args, outputs)] * len(outputs)
    else:
        results = [unknown(tracer, name, (args, kwargs), outputs)] * len(outputs)
    # Further results (indices, saved statistics) carry no channels that a network uses.
    return results + [(None,) * extra.dim() for extra in outputs[len(results) :]]
