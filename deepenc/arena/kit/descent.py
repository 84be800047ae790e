"""Gradient descent on whatever an attack wants to minimise, within what its threat model allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from deepenc.arena.case import Case


class Descent(NamedTuple):
    """How a descent went."""

    steps: int
    diverged: bool


def descend(
    case: Case,
    parameters: Iterable[Tensor],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    optimizer: Callable[..., Optimizer] = Adam,
) -> Descent:
    """Minimise a loss in place.

    Where the loss or the parameters are not finite, the last finite parameters come back. Gradients flow to
    the given parameters only; none are left behind.

    Args:
        case: Its budget cuts the steps.
        parameters: Leaf tensors to change.
        loss: Gives the loss, a scalar; called once per step.
        steps: At most.
        lr: Learning rate.
        optimizer: Class of torch's optimisers.

    Returns:
        Steps taken, and whether the descent diverged.

    Raises:
        OutOfBudget: The loss needs more samples than the threat model allows.
    """
    tuned = list(parameters)
    left = case.meter.left("steps")
    steps = steps if left is None else min(steps, left)
    wanted = [p.requires_grad for p in tuned]
    finite = [p.detach().clone() for p in tuned]
    try:
        for p in tuned:
            p.requires_grad_(True)
        descent = optimizer(tuned, lr=lr)
        for step in range(steps):
            with torch.enable_grad():
                value = loss()
                gradients = torch.autograd.grad(value, tuned, allow_unused=True)
            if not bool(value.isfinite()):
                return _back(tuned, finite, step)
            for p, kept, gradient in zip(tuned, finite, gradients, strict=True):
                kept.copy_(p.detach())
                p.grad = gradient
            descent.step()
            if not all(bool(p.isfinite().all()) for p in tuned):
                return _back(tuned, finite, step)
    finally:
        for p, grad in zip(tuned, wanted, strict=True):
            p.grad = None
            p.requires_grad_(grad)
    return Descent(steps, diverged=False)


def _back(tuned: list[Tensor], finite: list[Tensor], step: int) -> Descent:
    with torch.no_grad():
        for p, kept in zip(tuned, finite, strict=True):
            p.copy_(kept)
    return Descent(step, diverged=True)
