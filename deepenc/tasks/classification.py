"""Classification: one class for each example, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from deepenc import trees
from deepenc.tasks.task import Offer, Outcome, Task, Worth

FEW = 10
"""Classes up to which the five highest say nothing worth counting."""


class Classification(Task):
    """One class for each example; outputs are logits ``(examples, classes)``.

    The primary measure is accuracy; with more than ten classes Top-5 stands beside it. Of equal outputs the
    first class is named first.
    """

    name: ClassVar[str] = "classification"
    measure: ClassVar[str] = "accuracy"
    offers: ClassVar[frozenset[Offer]] = frozenset({"logits", "labels", "answers"})
    augments: ClassVar[bool] = True

    classes: int | None = Field(None, ge=2)
    """Number of classes; default: as many as the network has outputs."""

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """The outputs themselves, or what a network of transformers calls its logits."""
        return self.logits(super().run(network, inputs))

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Cross-entropy; targets are classes ``(examples,)`` or probabilities ``(examples, classes)``."""
        logits = self.run(network, inputs)
        return F.cross_entropy(
            logits if temperature == 1 else logits / temperature, targets, label_smoothing=smoothing
        )

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """Whether the class is the first, and whether it is among the first five."""
        logits = self.logits(outputs)
        order = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = (order == targets.to(logits.device)[:, None]) & ~logits.isnan().any(dim=1)[:, None]
        found = torch.stack([hits[:, 0], hits.any(dim=1)], dim=1).double().cpu().numpy()
        return list(found if logits.shape[1] > FEW else found[:, :1])

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """Accuracy, and Top-5 of more than ten classes."""
        first, *fifth = np.mean(outcomes, axis=0).tolist()
        return Worth(first, {"top-5": fifth[0]} if fifth else {})

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        return _no_logits(outputs, (trees.size(inputs), self.classes))

    def fitted(self, outputs: Any) -> Self:
        """With the number of classes."""
        if self.classes is not None or not isinstance(outputs, Tensor) or outputs.ndim != 2:
            return self
        return self.model_copy(update={"classes": outputs.shape[1]})

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        return _no_classes(targets, self.classes, ndim=1)

    def uninformative(self, targets: Any) -> str | None:
        """See `Task.uninformative`."""
        return "are of one class" if len(targets.unique()) < 2 else None

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The last layer with an output for each class."""
        return last_layer(network, self.classes)

    def logits(self, outputs: Any) -> Tensor:
        """The outputs themselves, or what a network of transformers calls its logits."""
        found: Tensor = getattr(outputs, "logits", outputs)
        return found

    def labels(self, targets: Any) -> Tensor:
        """The targets."""
        found: Tensor = targets
        return found

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """Probabilities of the classes."""
        return (self.logits(outputs).float() / temperature).softmax(dim=1)

    def numbers(self, outputs: Any) -> Tensor:
        """The logits."""
        return super().numbers(self.logits(outputs))


class MultiLabel(Task):
    """Any number of classes for each example; outputs are logits ``(examples, classes)``.

    Targets are 0 or 1 for each class. The primary measure is the F1 of all decisions taken together (micro);
    a class is named where its logit is above 0.
    """

    name: ClassVar[str] = "multi-label"
    measure: ClassVar[str] = "F1"
    offers: ClassVar[frozenset[Offer]] = frozenset({"answers"})
    augments: ClassVar[bool] = True

    classes: int | None = Field(None, ge=1)
    """Number of classes; default: as many as the network has outputs."""

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Binary cross-entropy of all classes."""
        logits = self.run(network, inputs) / temperature
        wanted = targets.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, wanted * (1 - smoothing) + smoothing / 2)

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """Classes named rightly, named wrongly, and missed; with a NaN all are missed."""
        named = outputs > 0
        wanted = targets.to(outputs.device) > 0.5
        counts = torch.stack([named & wanted, named & ~wanted, ~named & wanted]).sum(2).T
        return list(counts.double().cpu().numpy())

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """F1, with precision and recall."""
        right, wrong, missed = np.sum(outcomes, axis=0).tolist()
        precision = right / (right + wrong) if right + wrong else 0.0
        recall = right / (right + missed) if right + missed else 0.0
        f1 = 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0
        return Worth(f1, {"precision": precision, "recall": recall})

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        return _no_logits(outputs, (trees.size(inputs), self.classes))

    def fitted(self, outputs: Any) -> Self:
        """With the number of classes."""
        if self.classes is not None or not isinstance(outputs, Tensor) or outputs.ndim != 2:
            return self
        return self.model_copy(update={"classes": outputs.shape[1]})

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[1] != self.classes:
            return f"expected 0 or 1 for each of {self.classes} classes, got {trees.described(targets)}"
        return None if bool(((targets == 0) | (targets == 1)).all()) else "expected 0 or 1 for each class"

    def uninformative(self, targets: Any) -> str | None:
        """See `Task.uninformative`."""
        return "are of the same classes" if bool((targets == targets[:1]).all()) else None

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The last layer with an output for each class."""
        return last_layer(network, self.classes)

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """Probabilities of the classes."""
        return (outputs.float() / temperature).sigmoid()


def last_layer(network: nn.Module, outputs: int | None, *, auxiliary: bool = True) -> tuple[str, ...]:
    """Path of the last linear or convolutional layer with so many outputs, alone; empty where there is none.

    Args:
        network: The network.
        outputs: How many.
        auxiliary: Whether a layer counts that lies in a part whose name begins with "aux".
    """
    found = [
        path
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | _ConvNd)
        and outputs in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
        and (auxiliary or not path.startswith("aux"))
    ]
    return tuple(found[-1:])


def _no_logits(outputs: Any, shape: tuple[int, int | None]) -> str | None:
    wanted = f"floating point ({shape[0]}, {'classes' if shape[1] is None else shape[1]})"
    fits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2
    if fits and outputs.shape[0] == shape[0] and shape[1] in (None, outputs.shape[1]):
        return None
    return f"expected logits (examples, classes), here {wanted}, got {trees.described(outputs)}"


def _no_classes(targets: Any, classes: int | None, ndim: int) -> str | None:
    """What keeps targets from being classes, in words."""
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != ndim:
        return f"expected a class for each example, int64, got {trees.described(targets)}"
    if not targets.numel():
        return None
    least, most = int(targets.min()), int(targets.max())
    if least < 0 or (classes is not None and most >= classes):
        upper = "" if classes is None else f" and below {classes}, the number of classes"
        return f"expected classes from 0{upper}, got {least} to {most}"
    return None
