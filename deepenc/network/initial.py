"""Layers as they are before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def seeded(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Seed torch's global generators, those of the tensors' devices too, for a while; they come back."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(list(devices)), torch.no_grad():
        torch.manual_seed(seed)
        yield


def resetting(module: nn.Module) -> Callable[[], Any] | None:
    """What initialises a layer, in place, if it can do so itself."""
    found = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next((reset for reset in found if callable(reset)), None)
