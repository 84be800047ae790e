"""Equation 1: what a allocation does to the outputs, what it costs in memory, and the gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from deepenc import trees
from deepenc.encryption.cost.costs import Memory
from deepenc.encryption.response.measure import Measure, ResponseReader
from deepenc.errors import ConfigError
from deepenc.network.surgery import Layout
from deepenc.tasks.task import Task

Form = Literal["l2", "relative"]
"""Which number of a `Response` the gain counts."""


@dataclass(frozen=True)
class Response:
    """How far the encrypted network's outputs are from the victim's; not finite where those overflow.

    Attributes:
        l2: Mean over images of the L2 distance of the outputs, as Equation 1 is printed.
        squared: Mean over images of the squared distance.
        relative: ``squared`` divided by the mean squared norm of the victim's outputs.
    """

    l2: float
    squared: float
    relative: float


def response_change(
    original: nn.Module,
    encrypted: nn.Module,
    inputs: Any,
    batch_size: int = 256,
    measure: Measure = "logits",
    layout: Layout | None = None,
    task: Task | None = None,
) -> Response:
    """Response change of Equation 1 (E of ‖f(x; θ) − f(x; θ̄)‖₂): on logits, as it is printed, or on features.

    Args:
        original: The victim's network, in eval mode.
        encrypted: The encrypted network, in eval mode.
        inputs: The defender's inputs D, a batch of at least one.
        batch_size: Images per forward pass.
        measure: What f is: ``logits``, ``probabilities``, ``features`` (what goes into the last Linear), or
            ``features:NAME`` (what comes out of a layer).
        layout: Where the victim's channels lie in the encrypted network (``key.layout()``); needed where
            confusion channels go into the last Linear, which are left out.
        task: What the network is for; default: classification.

    Raises:
        ConfigError: No images, a network in training mode or without a tensor as output, no such layer, or
            one that holds confusion channels.
    """
    n = trees.size(inputs)
    if n == 0 or batch_size < 1:
        raise ConfigError(f"expected images in batches, got {n} images, {batch_size} a batch")
    reader = ResponseReader(original, measure, trees.take(inputs, slice(1)), task)
    distance = squared = norm = 0.0
    with torch.no_grad():
        for batch in trees.split(inputs, batch_size):
            clean, changed = reader(original, batch), reader(encrypted, batch, layout)
            reader.comparable(clean, changed)
            squares = (changed - clean).square().sum(dim=1)
            distance += squares.sqrt().sum().item()
            squared += squares.sum().item()
            norm += clean.square().sum().item()
    return Response(distance / n, squared / n, squared / norm if norm else float("inf") if squared else 0.0)


def gain(response: Response | float, memory: Memory | float, lam: float, form: Form = "l2") -> float:
    """Equation 1: ``G = response − λ · ΔMem / Mem``.

    Args:
        response: From `response_change`, or a number: any measure of the change.
        memory: From `memory`, or ΔMem / Mem itself.
        lam: λ, the price of memory, ``>= 0``, in the response's unit.
        form: Which number of a `Response` counts: ``l2`` as it is printed, or ``relative``, whose λ means the
            same for networks whose outputs are of another size.
    """
    change = getattr(response, form) if isinstance(response, Response) else response
    return float(change - lam * (memory.ratio if isinstance(memory, Memory) else memory))
