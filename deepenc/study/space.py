"""Where the next trial is: Optuna's samplers, kept from trying anything twice."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deepenc.arena.kit.space import Axis
from deepenc.errors import ConfigError
from deepenc.study.search import Search, size

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ENUMERABLE = 4096
"""Points of a space that are listed one by one."""


def distribution(axis: Axis) -> BaseDistribution:
    """An axis, as Optuna writes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = axis.low, axis.high
    if low is None or high is None:
        return CategoricalDistribution(axis.choices)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=axis.log)
    return FloatDistribution(low, high, log=axis.log)


def identity(search: Search, values: Mapping[str, Any]) -> str:
    """Two settings with the same identity make the same defense."""
    try:
        return json.dumps(search.variant(values).spec(), sort_keys=True)
    except ConfigError:
        return json.dumps(dict(values), sort_keys=True)


def points(search: Search) -> set[str] | None:
    """All defenses of a space; None where there are too many to list."""
    number = size(search.space)
    if number is None or number > ENUMERABLE:
        return None
    return {identity(search, values) for values in every(search.space)}


def every(space: tuple[Axis, ...]) -> list[dict[str, Any]]:
    """All settings of a space without an endless axis."""
    ranges = [
        axis.choices
        or (
            range(axis.low, axis.high + 1) if isinstance(axis.low, int) and isinstance(axis.high, int) else ()
        )
        or (axis.low,)
        for axis in space
    ]
    fields = [axis.field for axis in space]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*ranges)]
