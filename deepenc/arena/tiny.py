"""A network and images small enough for checks: random weights, labels by the network itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from deepenc.arena.build import Subject
from deepenc.victims.victim import Images, Victim, VictimSource

CLASSES = 4
SHAPE = (3, 8, 8)


class TinyNet(nn.Module):
    """Three convolutions with BatchNorm and a linear layer; ``(batch, 3, 8, 8)`` -> ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 40, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(40)
        self.fc = nn.Linear(40, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = torch.relu(self.bn2(self.conv2(hidden)))
        hidden = torch.relu(self.bn3(self.conv3(hidden)))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


@cache
def tiny_subject(attacker: int = 256) -> Subject:
    """The victim of the checks, which is right about every image, and its sites.

    Args:
        attacker: Images in the attacker's part.
    """
    generator = torch.Generator().manual_seed(20220131)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(20220131)
        model = TinyNet()
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.momentum = 1.0  # statistics of the one batch below
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        sample = torch.randn(512, *SHAPE, generator=generator)
        model.train()(sample)
        model.eval()
        for norm in (model.bn1, model.bn2, model.bn3):
            norm.momentum = 0.1
        # Spread the logits, so that the classes are about equally frequent.
        logits = model(sample)
        scale = 3 / logits.std(dim=0)
        model.fc.bias.copy_((model.fc.bias - logits.mean(dim=0)) * scale)
        model.fc.weight.mul_(scale[:, None])
    parts = (_images(model, count, generator) for count in (64, attacker, 256))
    defender, thief, judge = parts
    return Subject.of(Victim("tiny", model, CLASSES, defender, thief, judge, "tiny"))


def _images(model: nn.Module, count: int, generator: torch.Generator) -> Images:
    inputs = torch.randn(count, *SHAPE, generator=generator)
    with torch.no_grad():
        return Images(inputs, model(inputs).argmax(dim=1))


class TinySource(VictimSource):
    """The network of the checks."""

    name: ClassVar[str] = "tiny"

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        victim = tiny_subject().victim
        return victim.model, victim.example

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        return tiny_subject().victim
