"""Asking the authorised model, and how far a network is from what it answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.arena.case import Case
from deepenc.errors import ClaimError, ConfigError
from deepenc.tasks.examples import joined
from deepenc.tasks.task import Task

SMALL = 1e-12


def asked(case: Case, images: int, generator: torch.Generator) -> tuple[Any, Any]:
    """Inputs and the authorised model's outputs for them.

    Where fewer inputs are held than are wanted, noise takes their place, if it is an input at all.

    Raises:
        ClaimError: The threat model gives no answers, or there is nothing to ask.
    """
    if case.oracle is None:
        raise ClaimError("the attack needs answers of the authorised model: `oracle` in the threat model")
    left = case.meter.left("queries")
    wanted = images if left is None else min(images, left)
    held = joined([case.unlabelled, case.labelled])[:wanted].inputs
    if (missing := wanted - trees.size(held)) > 0:
        if not takes_noise(case):
            if trees.size(held):
                return held, case.oracle(held)
            raise ClaimError(
                f"no inputs are held, {wanted} are to be asked, and noise cannot take the "
                "place of inputs that are not one tensor of floats; give the attacker some"
            )
        noise = torch.randn(missing, *case.example.shape[1:], generator=generator).to(case.example)
        held = torch.cat([held, noise])
    return held, case.oracle(held)


def takes_noise(case: Case) -> bool:
    """Whether noise can be an input: it is one tensor of floats."""
    return isinstance(case.example, Tensor) and case.example.is_floating_point()


def far_from(task: Task, answers: Any) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """How far a network is from some answers: a function of it, of a batch, and of its answers' places."""
    try:
        numbers = task.numbers(answers)
    except ConfigError:  # not as many values for each input
        targets = task.answers(answers)
        return lambda network, inputs, places: task.loss(network, inputs, trees.take(targets, places))

    def missed(network: nn.Module, inputs: Any, places: Tensor) -> Tensor:
        wanted = numbers[places]
        far: Tensor = (task.numbers(task.run(network, inputs)) - wanted).square().sum()
        return far / wanted.square().sum().clamp_min(SMALL)

    return missed
