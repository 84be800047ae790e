"""Classification of texts, given as the ids of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from deepenc import trees
from deepenc.tasks.classification import Classification
from deepenc.tasks.task import Outcome, Worth

MEASURES = ("precision", "recall", "F1")


class TextClassification(Classification):
    """One class for each text; outputs are logits ``(examples, classes)``, or have them as ``logits``.

    Inputs are keyword arguments, such as ``input_ids`` and ``attention_mask``, int64 ``(examples, length)``
    each. The primary measure is accuracy; beside it stand precision, recall and F1 of each class that occurs
    (the paper's Table 4), and the mean of these F1 (macro).
    """

    name: ClassVar[str] = "text-classification"
    augments: ClassVar[bool] = False
    unit: ClassVar[str] = "tokens"

    class_names: tuple[str, ...] = ()
    """How tables call the classes, in their order; default: their numbers."""

    def units(self, inputs: Any) -> int:
        """Tokens that the mask lets through."""
        return tokens(inputs)

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """The class that the network names, -1 for none, and the true one."""
        logits = self.logits(outputs)
        named = logits.argmax(dim=1).where(~logits.isnan().any(dim=1), -1)
        return list(torch.stack([named.cpu(), targets.cpu()], dim=1).double().numpy())

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """Accuracy; precision, recall and F1 of the classes that occur, and macro F1."""
        named, true = np.stack(outcomes).astype(np.int64).T
        occurring = np.unique(true)
        each = precision_recall_fscore_support(true, named, labels=occurring, zero_division=0.0)[:3]
        further = {"macro F1": float(each[2].mean())}
        for measure, values in zip(MEASURES, each, strict=True):
            pairs = zip(occurring.tolist(), values.tolist(), strict=True)
            further |= {f"{measure} of {self._called(number)}": value for number, value in pairs}
        return Worth(float(accuracy_score(true, named)), further)

    def _called(self, number: int) -> str:
        return self.class_names[number] if number < len(self.class_names) else str(number)


def tokens(inputs: Any) -> int:
    """Tokens in a batch of texts: those that ``attention_mask`` lets through, else all ids."""
    if isinstance(inputs, dict) and "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return ids_of(inputs).numel()


def ids_of(inputs: Any) -> torch.Tensor:
    """The ids of the tokens, ``(examples, length)``: what is called so, else the first tensor."""
    named = inputs.get("input_ids") if isinstance(inputs, dict) else None
    return trees.tensors(inputs)[0] if named is None else named
