"""A tiny victim for each task: random networks, whose own answers are the targets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepenc.arena.checks.tiny import tiny_subject
from deepenc.tasks.classification import MultiLabel
from deepenc.tasks.examples import Examples
from deepenc.tasks.next_token import NextToken
from deepenc.tasks.regression import Regression
from deepenc.tasks.semantic_segmentation import SemanticSegmentation
from deepenc.tasks.task import Task
from deepenc.tasks.text_classification import TextClassification
from deepenc.victims.victim import Victim

SIZES = (64, 700, 48)
"""Examples of the defender, the attacker and the judge."""
WORDS, LENGTH = 24, 6


class Block(nn.Module):
    """Tokens as vectors, each mixed with those before it; ``(examples, length)`` -> ``(..., 12)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.norm = nn.LayerNorm(12)
        self.wide = nn.Linear(12, 20)
        self.narrow = nn.Linear(20, 12)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        hidden = hidden + hidden.cumsum(dim=1) / 4
        mixed: Tensor = hidden + self.narrow(torch.relu(self.wide(self.norm(hidden))))
        return mixed


class Reader(nn.Module):
    """A class for a text; called with keywords, as networks of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(12, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None].to(torch.float32)
        pooled = (self.block(input_ids) * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits: Tensor = self.head(pooled)
        return logits


class Writer(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.block.words.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(input_ids))
        return logits


def images(generator: torch.Generator, count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=generator)


def texts(generator: torch.Generator, count: int) -> dict[str, Tensor]:
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (count, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long()}


def victim(
    task: Task,
    make: Callable[[], nn.Module],
    draw: Callable[[torch.Generator, int], Any],
    target: Callable[[Any, Any], Any],
) -> Victim:
    """A victim for a task.

    Args:
        task: The task.
        make: Makes the network.
        draw: Draws so many inputs.
        target: Makes targets of inputs and the network's outputs.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make().eval()
    public = copy.deepcopy(model)
    parts = []
    with torch.no_grad():
        for parameter in public.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for count in SIZES:
            inputs = draw(generator, count)
            parts.append(Examples(inputs, target(inputs, task.run(model, inputs))))
    defender, attacker, judge = parts
    return Victim(task.name, model, task, defender, attacker, judge, "0" * 64, public)


def regression() -> Victim:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 2))

    return victim(
        Regression(outputs=2), make, lambda g, n: torch.randn(n, 5, generator=g), lambda inputs, out: out
    )


def multi_label() -> Victim:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 3),
        )

    return victim(MultiLabel(classes=3), make, images, lambda inputs, out: (out > 0).long())


def text_classification() -> Victim:
    return victim(TextClassification(classes=4), Reader, texts, lambda inputs, out: out.argmax(1))


def next_token() -> Victim:
    def draw(generator: torch.Generator, count: int) -> dict[str, Tensor]:
        return {"input_ids": texts(generator, count)["input_ids"]}

    return victim(NextToken(vocabulary=WORDS), Writer, draw, lambda inputs, out: inputs["input_ids"])


def semantic_segmentation() -> Victim:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 28, 3, padding=1),
            nn.BatchNorm2d(28),
            nn.ReLU(),
            nn.Conv2d(28, 3, 1),
        )

    return victim(SemanticSegmentation(classes=3), make, images, lambda inputs, out: out.argmax(1))


VICTIMS: dict[str, Callable[[], Victim]] = {
    "classification": lambda: tiny_subject(SIZES[1]).victim,
    "multi-label": multi_label,
    "next-token": next_token,
    "regression": regression,
    "semantic-segmentation": semantic_segmentation,
    "text-classification": text_classification,
}
"""A tiny victim for each task of the registry."""
