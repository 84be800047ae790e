"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deepenc import trees
from deepenc.tasks.classification import last_layer
from deepenc.tasks.task import Offer, Outcome, Task, Worth


class SemanticSegmentation(Task):
    """A class for each pixel; outputs are logits ``(examples, classes, height, width)``.

    They may also stand under ``out`` in a dict (torchvision's). Targets are classes ``(examples, height,
    width)``, int64. The primary measure is the mean over the classes that occur of intersection over union,
    pooled over all images (mIoU, as in PASCAL VOC); the share of pixels that are right stands beside it.
    """

    name: ClassVar[str] = "semantic-segmentation"
    measure: ClassVar[str] = "mIoU"
    at_once: ClassVar[int] = 8
    offers: ClassVar[frozenset[Offer]] = frozenset({"logits", "answers"})

    classes: int | None = Field(None, ge=2)
    """Number of classes; default: as many as the network has logits."""
    ignore: int = 255
    """Target of a pixel that does not count."""

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """The logits."""
        outputs = super().run(network, inputs)
        return outputs.get("out", outputs) if isinstance(outputs, dict) else outputs

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Cross-entropy, the mean over the pixels that count; or against the answers of a model."""
        logits = self.run(network, inputs)
        logits = logits if temperature == 1 else logits / temperature
        if targets.is_floating_point():
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return F.cross_entropy(logits, targets, ignore_index=self.ignore, label_smoothing=smoothing)

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """Pixels that count, then the intersection and the union of each class; ``1 + 2 · classes`` numbers.

        A pixel with a NaN among its logits is of no class.
        """
        classes = outputs.shape[1]
        named = outputs.argmax(dim=1).where(~outputs.isnan().any(dim=1), classes)
        pairs = zip(named, targets.to(outputs.device), strict=True)
        return [_overlaps(one, true, classes, self.ignore) for one, true in pairs]

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """mIoU, and pixel accuracy."""
        counted, *sums = np.sum(outcomes, axis=0).tolist()
        both, either = np.split(np.array(sums), 2)
        found = either > 0
        mean = float((both[found] / either[found]).mean()) if found.any() else 0.0
        return Worth(mean, {"pixel accuracy": float(both.sum() / max(1.0, counted))})

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        count = trees.size(inputs)
        fits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 4
        if fits and len(outputs) == count and self.classes in (None, outputs.shape[1]):
            return None
        wanted = f"({count}, {self.classes or 'classes'}, height, width)"
        return f"expected logits for each pixel, floating point {wanted}, got {trees.described(outputs)}"

    def fitted(self, outputs: Any) -> Self:
        """With the number of classes."""
        if self.classes is not None or not isinstance(outputs, Tensor) or outputs.ndim != 4:
            return self
        return self.model_copy(update={"classes": outputs.shape[1]})

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 3:
            got = trees.described(targets)
            return f"expected a class for each pixel (examples, height, width), int64, got {got}"
        counted = targets[targets != self.ignore]
        if not counted.numel():
            return f"expected a pixel that counts, got {self.ignore} everywhere"
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or (self.classes is not None and most >= self.classes):
            upper = "" if self.classes is None else f" and below {self.classes}, the number of classes"
            return f"expected classes from 0{upper}, or {self.ignore} to ignore, got {least} to {most}"
        return None

    def uninformative(self, targets: Any) -> str | None:
        """See `Task.uninformative`."""
        return (
            "are of one class at every pixel" if len(targets[targets != self.ignore].unique()) < 2 else None
        )

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The last layer with a logit for each class, but for those of auxiliary outputs."""
        return last_layer(network, self.classes, auxiliary=False)

    def logits(self, outputs: Any) -> Tensor:
        """Scores of the classes, a row for each pixel of each image."""
        found: Tensor = outputs.movedim(1, -1).flatten(0, -2)
        return found

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """Probabilities of the classes at each pixel, ``(examples, classes, height, width)``."""
        return (outputs.float() / temperature).softmax(dim=1)


def _overlaps(named: Tensor, true: Tensor, classes: int, ignore: int) -> Outcome:
    """Pixels that count, intersections, unions; ``classes`` itself names no class."""
    # Imported here: it takes a second, and only the judge needs it.
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(
        named.flatten(), true.flatten(), classes + 1, ignore_index=ignore, validate_args=False
    )
    table = counts.double().cpu().numpy()
    both = table.diagonal()
    either = table.sum(axis=0) + table.sum(axis=1) - both
    return np.concatenate([[table.sum()], both[:classes], either[:classes]])
