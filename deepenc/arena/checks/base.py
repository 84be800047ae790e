"""What checks of plugins share: a promise, and seeing that nothing else was changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.errors import DeepencError

Body = Callable[[], None]


class Broken(DeepencError):
    """A promise of its interface that a plugin does not keep."""


class NothingPromised(DeepencError):
    """There is nothing to check: the plugin promises nothing of the kind."""


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: What is promised.
        body: Raises `Broken` where the promise is broken, `NothingPromised` where there is none.
    """

    name: str
    body: Body


@contextmanager
def watched() -> Iterator[list[str]]:
    """Restore the global generators and the grad mode; the list says at the end what was done to them."""
    before, grad = _global_state(), torch.is_grad_enabled()
    done: list[str] = []
    try:
        yield done
    finally:
        after = _global_state()
        if changed := [kind for kind in before if not _same(before[kind], after[kind])]:
            done.append(
                f"drew from the global generators of {', '.join(changed)}: draw from the generator that it "
                "is given, or inside torch.random.fork_rng()"
            )
        if torch.is_grad_enabled() != grad:
            done.append("left the grad mode changed: use `with torch.no_grad():`")
        torch.set_grad_enabled(grad)
        torch.set_rng_state(before["torch"])
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])  # noqa: NPY002 - the very state that is guarded


def _global_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return bool(np.array_equal(first, second))
    if isinstance(first, tuple):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Releases of all tensors of a network's state dict."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit (NaN equals NaN)."""
    return sorted(
        name
        for name in {*first, *second}
        if name not in first or name not in second or not _equal(first[name], second[name])
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.nan_to_num(), second.nan_to_num()) and torch.equal(first.isnan(), second.isnan())
