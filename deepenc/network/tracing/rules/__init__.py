"""What each operator does to the axes: one rule an operator.

A rule gets what is known, the tensors that the operator returned and its arguments, and returns the axes of
the results. An operator without a rule fixes all axes it touches, so that an unknown operator can cost
sites but never exactness.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules import layers, shapes
from deepenc.network.tracing.rules.pointwise import pointwise
from deepenc.network.tracing.rules.registry import RULES, Result, unknown

__all__ = ["apply", "layers", "shapes"]


def apply(
    known: Known, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> list[Result]:
    """Axes of each tensor that an operator returned.

    Args:
        known: The axes of the arguments.
        op: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors it returned.
    """
    if not outputs:
        return []
    name = op.overloadpacket.__name__.removesuffix("_")
    if name in RULES:
        results = RULES[name](known, outputs, *args, **kwargs)
    elif torch.Tag.pointwise in op.tags:
        results = [pointwise(known, name, args, outputs)] * len(outputs)
    else:
        results = [unknown(known, name, (args, kwargs), outputs)] * len(outputs)
    # Further results (indices, saved statistics) carry no channels that a network uses.
    return results + [(None,) * extra.dim() for extra in outputs[len(results) :]]
