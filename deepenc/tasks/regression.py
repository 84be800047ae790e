"""Regression: some numbers for each example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from sklearn.metrics import mean_squared_error, r2_score
from torch import Tensor, nn
from torch.nn import functional as F

from deepenc import trees
from deepenc.tasks.classification import last_layer
from deepenc.tasks.task import Offer, Outcome, Task, Worth


class Regression(Task):
    """Numbers for each example; outputs and targets are ``(examples, ...)``, or ``(examples,)`` for one.

    The primary measure is the coefficient of determination R², the mean over the numbers, cut to [0, 1]: 0
    is no better than to name the mean. An example that the network gives no finite number counts as if it
    had named the mean.
    """

    name: ClassVar[str] = "regression"
    measure: ClassVar[str] = "R2"
    offers: ClassVar[frozenset[Offer]] = frozenset({"answers"})

    outputs: int | None = Field(None, ge=1)
    """Numbers for each example; default: as many as the network has outputs."""

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Mean squared error."""
        outputs = _rows(self.run(network, inputs))
        return F.mse_loss(outputs, _rows(targets).to(outputs.dtype))

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """Whether the outputs are finite, the outputs, and the targets; ``1 + 2 · outputs`` numbers."""
        found = _rows(outputs).double().cpu()
        wanted = _rows(targets).double().cpu()
        largest = torch.finfo(torch.float32).max  # what a record can hold
        readable = found.isfinite().all(dim=1, keepdim=True)
        found = found.nan_to_num(nan=0.0).clamp(-largest, largest)
        return list(torch.cat([readable.double(), found, wanted], dim=1).numpy())

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """R², and the mean squared error (MSE) in the targets' unit, squared."""
        table = np.stack(outcomes)
        readable = table[:, 0] == 1
        found, wanted = np.split(table[:, 1:], 2, axis=1)
        found = np.where(readable[:, None], found, wanted.mean(axis=0))
        error = float(mean_squared_error(wanted, found))
        if len(wanted) < 2:  # there is no variance to explain
            return Worth(float(error == 0), {"MSE": error})
        return Worth(float(np.clip(r2_score(wanted, found), 0, 1)), {"MSE": error})

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        count = trees.size(inputs)
        fits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim > 0
        if fits and len(outputs) == count and self.outputs in (None, outputs.numel() // max(1, count)):
            return None
        each = "some numbers" if self.outputs is None else f"{self.outputs} numbers"
        return f"expected {each} for each of {count} examples, got {trees.described(outputs)}"

    def fitted(self, outputs: Any) -> Self:
        """With how many numbers there are."""
        if self.outputs is not None or not isinstance(outputs, Tensor) or not outputs.numel():
            return self
        return self.model_copy(update={"outputs": outputs.numel() // len(outputs)})

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        each = "a number" if self.outputs in (None, 1) else f"{self.outputs} numbers"
        if not isinstance(targets, Tensor) or not targets.ndim or targets.is_complex():
            return f"expected {each} for each example, got {trees.described(targets)}"
        if self.outputs is not None and targets.numel() != len(targets) * self.outputs:
            return f"expected {each} for each example, got {trees.described(targets)}"
        return None if bool(targets.isfinite().all()) else "expected finite numbers, got some that are not"

    def uninformative(self, targets: Any) -> str | None:
        """See `Task.uninformative`."""
        rows = _rows(targets)
        return "have the same target" if bool((rows == rows[:1]).all()) else None

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The last layer with as many outputs."""
        return last_layer(network, self.outputs)

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """The outputs themselves."""
        return outputs


def _rows(values: Tensor) -> Tensor:
    """Numbers as ``(examples, outputs)``."""
    return values.reshape(len(values), -1)
