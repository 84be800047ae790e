"""Run operators on the meta device quickly: those of a kind that was run before are not run again.

torch computes the shapes of many results in Python, a millisecond and more for a BatchNorm; networks repeat
their layers.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepenc.network.guard import note


class DryRun(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A dispatch mode that remembers the shapes of results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Hashable, list[tuple[Any, Any, torch.dtype]] | None] = {}

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(op, args, kwargs or {})

    def decomposed(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator that torch composes of others, each dispatched; else NotImplemented.

        Under `torch.inference_mode` such operators come as they are called.
        """
        if not torch.is_inference_mode_enabled():
            return NotImplemented
        with self:
            return op.decompose(*args, **kwargs)

    def run(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of an operator; meta tensors of the right shapes where all tensors given are such."""
        result = self._run(op, args, kwargs)
        note(result)
        return result

    def _run(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op._schema.is_mutable or any(result.alias_info for result in op._schema.returns):
            return op(*args, **kwargs)
        try:
            kind = (op, _signature(args), _signature(kwargs))
            known = self._known.get(kind)
        except TypeError:  # something that cannot be hashed, or a tensor with values
            return op(*args, **kwargs)
        if known is not None:
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                for shape, stride, dtype in known
            ]
            return made[0] if len(op._schema.returns) == 1 else tuple(made)
        result = op(*args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        if all(isinstance(part, Tensor) and part.is_meta for part in parts):
            self._known[kind] = [(part.shape, part.stride(), part.dtype) for part in parts]
        return result


def _signature(value: Any) -> Hashable:
    """What an argument is, for the shapes of the results; raises TypeError for a tensor with values."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(_signature(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _signature(part)) for name, part in value.items())
    hash(value)
    return type(value), value
