"""Operators that sum, pick or normalise along dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, drop, fix, rule_of_parts


@rule_of_parts("mean", "sum", "nansum", "prod", "amax", "amin", "aminmax", "argmax", "argmin", "any", "all")
@rule_of_parts("var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "logsumexp")
@rule_of_parts("max", "min", "median", "nanmedian", "mode", "kthvalue", "count_nonzero")
def _reduce(
    known: Known,
    outputs: list[Tensor],
    x: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    **_: Any,
) -> list[Result]:
    """Without dimensions, or with an empty list of them, over all."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.dim()))
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    axes = drop(known, x, sorted(gone), "reduces over it")
    return [tuple(axis for d, axis in enumerate(axes) if keepdim or d not in gone)] * len(outputs)


@rule_of_parts("_softmax", "_safe_softmax", "_log_softmax")
def _softmax(known: Known, outputs: list[Tensor], x: Tensor, dim: int, **_: Any) -> list[Result]:
    return [tuple(fix(known, x, [dim] if x.dim() else [], "normalises over it"))]


@rule_of_parts("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk")
def _along(known: Known, outputs: list[Tensor], x: Tensor, dim: int, **_: Any) -> list[Result]:
    axes = drop(known, x, [dim] if x.dim() else [], "sums or sorts along it")
    return [tuple(axes)] * len(outputs)
