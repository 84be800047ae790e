"""Measures of damage that have gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepenc.errors import ConfigError

Objective = Literal["response", "cross-entropy"]
"""The logarithm of the relative squared response change (Equation 1 with a scale that does not matter), or
the cross-entropy with the victim's own predictions."""


def outputs(model: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    """What a victim makes of inputs, ``(images, outputs)``, without gradients.

    Raises:
        ConfigError: It makes something else.
    """
    with torch.no_grad():
        parts = [model(part) for part in torch.split(inputs, batch_size)]
    wrong = next((part for part in parts if not isinstance(part, Tensor) or part.ndim != 2), None)
    if wrong is not None:
        got = tuple(wrong.shape) if isinstance(wrong, Tensor) else type(wrong).__name__
        raise ConfigError(
            f"expected a victim that maps images to a tensor (images, outputs), got {got}; wrap it in one "
            "that does"
        )
    return torch.cat(parts)


def damage(objective: Objective, encrypted: Tensor, victim: Tensor) -> Tensor:
    """How different the outputs of the encrypted network are from the victim's, ``(images, outputs)``."""
    return _MEASURES[objective](encrypted, victim)


def _response(encrypted: Tensor, victim: Tensor) -> Tensor:
    change = (encrypted - victim).square().sum() / victim.square().sum()
    return (change + 1e-12).log()


def _cross_entropy(encrypted: Tensor, victim: Tensor) -> Tensor:
    return cross_entropy(encrypted, victim.argmax(1))


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(get_args(Objective), (_response, _cross_entropy), strict=True)
)
