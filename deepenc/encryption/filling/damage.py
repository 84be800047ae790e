"""Measures of damage that have gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deepenc import trees
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.tasks.task import Task

Objective = Literal["response", "cross-entropy"]
"""The logarithm of the relative squared response change (Equation 1 with a scale that does not matter), or
the cross-entropy with the victim's own predictions."""


def responses(original: Original, inputs: Any, batch_size: int) -> Any:
    """What a victim makes of inputs, as its task compares it, without gradients.

    Raises:
        ConfigError: It makes something that cannot be compared.
    """
    with torch.no_grad():
        parts = [original.task.response(original.model, part) for part in trees.split(inputs, batch_size)]
    original.task.numbers(parts[0])
    return trees.join(parts)


def damage(objective: Objective, task: Task, encrypted: Any, victim: Any) -> Tensor:
    """How different the responses of the encrypted network are from the victim's.

    Raises:
        ConfigError: The task has no class scores, which the cross-entropy needs.
    """
    if objective == "cross-entropy":
        if "logits" not in task.offers:
            raise ConfigError(f"the task {task.name!r} has no class scores; take the objective 'response'")
        return cross_entropy(task.logits(encrypted), task.logits(victim).argmax(1))
    clean = task.numbers(victim)
    change = (task.numbers(encrypted) - clean).square().sum() / clean.square().sum()
    return (change + 1e-12).log()
