"""Language models: the next token of a text."""

from __future__ import annotations

import math
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
from deepenc.tasks.text_classification import ids_of, tokens

LARGEST = 100.0
"""Cross-entropy, in nats, beyond which a token counts no more: a token of probability 0 would be infinite."""


class NextToken(Task):
    """The next token at each place of a text; outputs are logits ``(examples, length, vocabulary)``.

    Inputs are ids ``(examples, length)``, or keyword arguments such as ``input_ids`` and ``attention_mask``.
    Targets are the ids themselves, int64, of which the network at each place is to know the one after it.
    The primary measure is the share of tokens that it gives the highest logit; perplexity stands beside it.
    """

    name: ClassVar[str] = "next-token"
    measure: ClassVar[str] = "next-token accuracy"
    at_once: ClassVar[int] = 32
    offers: ClassVar[frozenset[Offer]] = frozenset({"logits", "answers"})
    unit: ClassVar[str] = "tokens"

    vocabulary: int | None = Field(None, ge=2)
    """Number of tokens; default: as many as the network has logits."""
    shifted: bool = False
    """Whether each target stands where it is to be foretold, one place before its token, not with its
    token."""
    padding: int = -100
    """Target of a place that does not count."""

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """The logits, as a network of transformers calls them, or the outputs themselves."""
        outputs = super().run(network, inputs)
        return getattr(outputs, "logits", outputs)

    def units(self, inputs: Any) -> int:
        """Tokens."""
        return tokens(inputs)

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """Cross-entropy, the mean over all tokens of the batch that count.

        Targets may also be a model's answers at each place, ``(examples, length, vocabulary)``.
        """
        logits = self.run(network, inputs)
        logits = logits if temperature == 1 else logits / temperature
        if targets.is_floating_point():
            mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
            heard = slice(None) if mask is None else mask.flatten().bool()
            rows, wanted = logits.flatten(0, 1)[heard], targets.flatten(0, 1)[heard]
            return F.cross_entropy(rows, wanted, label_smoothing=smoothing)
        logits, targets = self._foretold(logits, targets)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=self.padding, label_smoothing=smoothing
        )

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """Tokens foretold, tokens that count, and their cross-entropy in nats, each summed over a text.

        Where the network says nothing readable the cross-entropy is that of a guess.
        """
        logits, wanted = self._foretold(outputs, targets.to(outputs.device))
        counted = wanted != self.padding
        right = (logits.argmax(-1) == wanted) & ~logits.isnan().any(-1) & counted
        lost = F.cross_entropy(
            logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=self.padding, reduction="none"
        )
        lost = lost.nan_to_num(nan=math.log(logits.shape[-1]), posinf=LARGEST).clamp_max(LARGEST)
        lost = lost.view_as(wanted).double() * counted
        found = torch.stack([right.sum(1), counted.sum(1), lost.sum(1)], dim=1)
        return list(found.double().cpu().numpy())

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """Next-token accuracy, and perplexity, over the tokens of all texts."""
        right, counted, lost = np.sum(outcomes, axis=0).tolist()
        each = max(1.0, counted)
        return Worth(right / each, {"perplexity": math.exp(lost / each)})

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        rows, length = ids_of(inputs).shape[:2]
        wanted = (rows, length, self.vocabulary)
        fits = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 3
        if fits and all(w in (None, got) for w, got in zip(wanted, outputs.shape, strict=True)):
            return None
        said = ", ".join("vocabulary" if size is None else str(size) for size in wanted)
        return (
            "expected logits (examples, length, vocabulary), here floating point "
            f"({said}), got {trees.described(outputs)}"
        )

    def fitted(self, outputs: Any) -> Self:
        """With the number of tokens."""
        if self.vocabulary is not None or not isinstance(outputs, Tensor) or outputs.ndim != 3:
            return self
        return self.model_copy(update={"vocabulary": outputs.shape[2]})

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 2:
            return f"expected the ids of tokens (examples, length), int64, got {trees.described(targets)}"
        held = targets if self.shifted else targets[:, 1:]
        if not bool((held != self.padding).any(dim=1).all()):
            return "expected a token to foretell in each example, got one without"
        counted = targets[targets != self.padding]
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or (self.vocabulary is not None and most >= self.vocabulary):
            upper = "" if self.vocabulary is None else f" and below {self.vocabulary}, the vocabulary"
            return f"expected ids from 0{upper}, or {self.padding} where none counts, got {least} to {most}"
        return None

    def uninformative(self, targets: Any) -> str | None:
        """See `Task.uninformative`."""
        held = targets if self.shifted else targets[:, 1:]
        return "are of one token" if len(held[held != self.padding].unique()) < 2 else None

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The last layer with a logit for each token; where it is tied, the embedding is trained with it."""
        return last_layer(network, self.vocabulary)

    def logits(self, outputs: Any) -> Tensor:
        """Scores of all tokens, a row for each place of each text."""
        found: Tensor = getattr(outputs, "logits", outputs).flatten(0, 1)
        return found

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """Probabilities of all tokens at each place, ``(examples, length, vocabulary)``."""
        return (getattr(outputs, "logits", outputs).float() / temperature).softmax(dim=-1)

    def _foretold(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the tokens that they are to foretell, ``(examples, places)``."""
        return (logits, targets) if self.shifted else (logits[:, :-1], targets[:, 1:])
