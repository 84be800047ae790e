"""The authorised model, as somebody may query it who cannot look inside."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from deepenc import trees
from deepenc.arena.threat import Meter
from deepenc.tasks.task import Task

# The models stay here: whatever is looked up on an oracle leads to a number.
_authorised: dict[int, tuple[nn.Module, Task, torch.device]] = {}
_numbers = itertools.count()


class Oracle:
    """Answers a batch of inputs with the model's outputs, and charges a query for each.

    The outputs are those that count for the task: networks of transformers also hand out what goes on inside.

    Args:
        model: The victim's network; it is run where it is.
        task: What it is for.
        device: Where the answers go.
        meter: Is charged.
    """

    def __init__(self, model: nn.Module, task: Task, device: torch.device, meter: Meter) -> None:
        self._number = next(_numbers)
        self._meter = meter
        _authorised[self._number] = (model, task, device)
        weakref.finalize(self, _authorised.pop, self._number)

    def __call__(self, inputs: Any) -> Any:
        """Ask.

        Raises:
            OutOfBudget: The threat model allows fewer queries.
        """
        self._meter.charge(queries=trees.size(inputs))
        model, task, device = _authorised[self._number]
        home = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            answers = task.run(model, trees.move(inputs, home, copy=True))
        return trees.move(answers, device, copy=True)

    def __deepcopy__(self, memo: dict[int, object]) -> Oracle:
        """Releases of a case ask the same model."""
        return self
