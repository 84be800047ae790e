"""The authorised model, as somebody may query it who cannot look inside."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

from deepenc.arena.threat import Meter

# The models stay here: whatever is looked up on an oracle leads to a number.
_authorised: dict[int, tuple[nn.Module, torch.device]] = {}
_numbers = itertools.count()


class Oracle:
    """Answers inputs ``(n, ...)`` with logits ``(n, classes)``, and charges ``n`` queries.

    Args:
        model: The victim's network; it is run where it is.
        device: Where the answers go.
        meter: Is charged.
    """

    def __init__(self, model: nn.Module, device: torch.device, meter: Meter) -> None:
        self._number = next(_numbers)
        self._meter = meter
        _authorised[self._number] = (model, device)
        weakref.finalize(self, _authorised.pop, self._number)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Ask.

        Raises:
            OutOfBudget: The threat model allows fewer queries.
        """
        self._meter.charge(queries=len(inputs))
        model, device = _authorised[self._number]
        home = next((p.device for p in model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            answers: Tensor = model(inputs.detach().to(home, copy=True))
        return answers.to(device, copy=True)

    def __deepcopy__(self, memo: dict[int, object]) -> Oracle:
        """Releases of a case ask the same model."""
        return self
