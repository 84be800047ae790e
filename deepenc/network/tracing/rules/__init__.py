"""What each operator does to the axes: one rule an operator.

A rule gets what is known, the tensors that the operator returned, its first argument, and the others by
their names in its schema, with their defaults; it returns the axes of the results. An operator without a
rule, or one that is called in a way that its rule does not expect, fixes all axes it touches: it can cost
sites but never exactness.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepenc.network.tracing.known import Known, Value
from deepenc.network.tracing.rules import indexing, layers, products, reductions, resampling, shapes
from deepenc.network.tracing.rules.pointwise import pointwise
from deepenc.network.tracing.rules.registry import RULES, Result, unknown

_log = logging.getLogger(__name__)

__all__ = ["apply", "indexing", "layers", "products", "reductions", "resampling", "shapes"]


def apply(
    known: Known, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Tensor]
) -> None:
    """Note what is known of each tensor that an operator returned.

    Args:
        known: What is known of the arguments.
        op: The ATen overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: The tensors it returned.
    """
    given = {
        name: args[place] if place < len(args) else kwargs.get(name, default)
        for place, (name, default) in enumerate(_arguments(op))
    }
    tensors = [leaf for leaf in tree_leaves(tuple(given.values())) if isinstance(leaf, Tensor)]
    values = [known.value(tensor) for tensor in tensors]
    known.scores = next((value.scores for value in values if value.scores is not None), None)
    known.state = all(value.state for value in values)
    results = _axes(known, op.overloadpacket.__name__.removesuffix("_"), op, given, list(outputs))
    if not known.state and op._schema.is_mutable:
        for argument in op._schema.arguments:
            written = given.get(argument.name)
            if argument.alias_info and argument.alias_info.is_write and isinstance(written, Tensor):
                known.write(written)
    for output, axes in zip(outputs, results, strict=True):
        known.learn(output, Value(axes, known.state, known.scores))


@cache
def _arguments(op: Any) -> tuple[tuple[str, Any], ...]:
    """Names of an operator's arguments, and their defaults."""
    return tuple(
        (argument.name, argument.default_value if argument.has_default_value() else None)
        for argument in op._schema.arguments
    )


def _axes(known: Known, name: str, op: Any, given: dict[str, Any], outputs: list[Tensor]) -> list[Result]:
    """Axes of each tensor that an operator returned."""
    if not outputs:
        return []
    try:
        if name in RULES:
            first, *others = given
            results = RULES[name](known, outputs, given[first], **{other: given[other] for other in others})
        elif torch.Tag.pointwise in op.tags:
            results = [pointwise(known, name, tuple(given.values()), outputs)] * len(outputs)
        else:
            results = [unknown(known, name, given, outputs)]
        # Further results are masks and saved statistics, which no network uses.
        results += [(None,) * extra.dim() for extra in outputs[len(results) :]]
        fits = all(map(_fits, results, outputs)) and len(results) == len(outputs)
    except Exception:  # a call that its rule does not expect is no fault of the network
        _log.debug("operator %s in %s", name, known.where, exc_info=True)
        fits = False
    return (
        results
        if fits
        else [unknown(known, name, given, outputs)] + [(None,) * extra.dim() for extra in outputs[1:]]
    )


def _fits(axes: Result, output: Tensor) -> bool:
    """Whether there is an axis for each dimension, None or as long as it."""
    return len(axes) == output.dim() and all(
        axis is None or len(axis) == size for axis, size in zip(axes, output.shape, strict=True)
    )
