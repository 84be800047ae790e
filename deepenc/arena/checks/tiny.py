"""What checks run on: a small network with random weights, labelled by itself, and a plain defense."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.arena.build import Subject
from deepenc.encryption.defense import Allocation, Defense, Hardening, Neurons, Original, Placement, Weights
from deepenc.network.sites import Role
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.victim import Victim, VictimSource

CLASSES = 4
SHAPE = (3, 8, 8)
SEED = 20220131


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
        attacker: Examples in the attacker's part.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = TinyNet()
        for norm in norms(model):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
        return settled(model, attacker)


def norms(model: TinyNet) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]:
    """The BatchNorm layers."""
    return model.bn1, model.bn2, model.bn3


def settled(model: TinyNet, attacker: int) -> Subject:
    """A network with the running statistics of its images, in which all classes occur, as a victim.

    Args:
        model: Changed in place.
        attacker: Examples in the attacker's part.
    """
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(512, *SHAPE, generator=generator)
    for norm in norms(model):
        norm.momentum = 1.0  # statistics of the one batch below
    with torch.no_grad():
        model.train()(sample)
        # Spread the logits, so that the classes are about equally frequent.
        logits = model.eval()(sample)
        scale = 3 / logits.std(dim=0)
        model.fc.bias.copy_((model.fc.bias - logits.mean(dim=0)) * scale)
        model.fc.weight.mul_(scale[:, None])
    for norm in norms(model):
        norm.momentum = 0.1
    return Subject.of(tiny_victim(model, attacker, generator))


def tiny_victim(model: nn.Module, attacker: int, generator: torch.Generator) -> Victim:
    """A victim with images of noise, labelled by the network itself; its public network is near to it."""
    defender, thief, judge = (_images(model, count, generator) for count in (64, attacker, 256))
    public = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in public.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.05 * float(parameter.square().mean().sqrt()))
    return Victim("tiny", model, Classification(classes=CLASSES), defender, thief, judge, "tiny", public)


def _images(model: nn.Module, count: int, generator: torch.Generator) -> Examples:
    inputs = torch.randn(count, *SHAPE, generator=generator)
    with torch.no_grad():
        return Examples(inputs, model(inputs).argmax(dim=1))


Unusual = Literal["half precision", "double precision", "constant channels", "an output that is not finite"]
"""What attacks and defenses must bear in a network."""


@cache
def unusual_subject(kind: Unusual, attacker: int = 256) -> Subject:
    """As `tiny_subject`, with an unusual network.

    Args:
        kind: What is unusual about it.
        attacker: Examples in the attacker's part.
    """
    victim, sites = tiny_subject(attacker).victim, tiny_subject(attacker).sites
    model = copy.deepcopy(victim.model)
    assert isinstance(model, TinyNet) and victim.public is not None and model.bn2.running_var is not None
    if kind == "constant channels":
        with torch.no_grad():
            model.conv2.weight[:5] = 0
            model.conv3.weight.fill_(0.5)
            model.bn2.running_var[3] = 0
        return Subject(replace(victim, model=model), sites)
    if kind == "an output that is not finite":
        with torch.no_grad():
            model.fc.bias[0] = torch.inf
        return Subject(replace(victim, model=model), sites)
    dtype = torch.bfloat16 if kind == "half precision" else torch.float64

    def cast(images: Examples) -> Examples:
        return Examples(images.inputs.to(dtype), images.targets)

    return Subject(
        replace(
            victim,
            model=model.to(dtype),
            defender=cast(victim.defender),
            attacker=cast(victim.attacker),
            judge=cast(victim.judge),
            public=copy.deepcopy(victim.public).to(dtype),
        ),
        sites,
    )


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


class TwoEach(Placement):
    """Two confusion channels at every site."""

    name: ClassVar[str] = "two-each"

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """See `Placement.place`."""
        return {site.name: 2 for site in original.sites}


class Noise(Weights):
    """Normal numbers with the deviation of the victim's tensor; variances are made positive."""

    name: ClassVar[str] = "noise"

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        values = []
        for gap in neurons.gaps:
            scale = float(gap.victim.double().square().mean().sqrt())
            drawn = torch.from_numpy(rng.normal(0, scale, gap.shape)).to(gap.victim.dtype)
            values.append(drawn.abs() + 1e-3 if gap.slot.role is Role.VARIANCE else drawn)
        return values


def host_defense(
    placement: Placement | None = None,
    weights: Weights | None = None,
    hardening: Hardening | None = None,
) -> Defense:
    """A defense of the plugin under check, with plain parts for the rest."""
    return Defense(
        name="host",
        placement=placement or TwoEach(),
        weights=weights or Noise(),
        hardening=() if hardening is None else (hardening,),
    )
