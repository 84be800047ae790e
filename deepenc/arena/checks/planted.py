"""Planted weaknesses: a tiny victim and confusion channels that a working attack cannot miss.

The victim's weights have what training gives: smooth kernels, rows in a small subspace, inputs of unequal
scale, and scales of the normalisation that go with the outgoing weights. Its confusion channels are what the
weakness says, and like the victim's tensors in all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from deepenc.arena.build import Subject
from deepenc.arena.case import Weakness
from deepenc.arena.checks.tiny import CLASSES, SEED, TinyNet, norms, settled, tiny_victim
from deepenc.encryption.defense import Allocation, Defense, Gap, Neurons, Original, Placement, Weights
from deepenc.network.sites import Role
from deepenc.tasks.examples import Examples

RANK = 4
DEVIATION = 0.1
CENTRE = {Role.SCALE: 1.0, Role.VARIANCE: 1.0}
"""Where a layer starts; all other entries at 0."""


class PlantedPlacement(Placement):
    """As many confusion channels at every site."""

    name: ClassVar[str] = "planted-placement"

    count: int = Field(4, ge=1)
    """How many."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """See `Placement.place`."""
        return {site.name: self.count for site in original.sites}


class PlantedWeights(Weights):
    """White noise, except for the weakness.

    All are harmless but ``damage`` and ``loud``: their outgoing weights are small.
    """

    name: ClassVar[str] = "planted-weights"

    weakness: Weakness
    """Loud: constant weights of ten times the norm. Releases: weights that occur in the victim's tensor.
    Defaults: normalisation as a layer starts. Statistics: running statistics far from the truth. Noise:
    nothing else. Damage: large outgoing weights. Clones: nearly a real channel."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        sources = rng.integers(neurons.site.width, size=neurons.count)
        return [self._values(gap, neurons.site.width, sources, rng) for gap in neurons.gaps]

    def _values(self, gap: Gap, width: int, sources: np.ndarray, rng: np.random.Generator) -> Tensor:
        victim, role = gap.victim, gap.slot.role
        like = real_entries(gap, width, sources, rng)
        if role not in (Role.INCOMING, Role.OUTGOING):
            match self.weakness:
                case "defaults":
                    return torch.full(gap.shape, CENTRE.get(role, 0.0), dtype=victim.dtype)
                case "statistics" if role is Role.MEAN:
                    return like - 9 * victim.abs().mean()
                case "statistics" if role is Role.VARIANCE:
                    return like / 9
            return like
        scale = float(victim.double().square().mean().sqrt())
        match self.weakness:
            case "loud":
                return torch.full(gap.shape, 10 * scale, dtype=victim.dtype)
            case "duplicates":
                drawn = torch.from_numpy(rng.integers(victim.numel(), size=gap.shape))
                return victim.flatten()[drawn]
            case "clones":
                return like * torch.from_numpy(rng.normal(1, 0.02, gap.shape)).to(victim.dtype)
        if role is Role.OUTGOING:
            scale *= 4.0 if self.weakness == "damage" else 0.3
        return torch.from_numpy(rng.normal(0, scale, gap.shape)).to(victim.dtype)


def real_entries(gap: Gap, width: int, sources: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The entries of real channels, shaped for a gap; where another site widened the tensor, drawn again."""
    rows = gap.slot.rows(gap.victim, width)[torch.from_numpy(sources)]
    shape = list(gap.shape)
    count = len(sources)
    features = int(np.prod(shape)) // count
    if features > rows.shape[1]:
        more = torch.from_numpy(rng.integers(rows.shape[1], size=features - rows.shape[1]))
        rows = torch.cat([rows, rows[:, more]], dim=1)
    others = [size for dim, size in enumerate(shape) if dim != gap.slot.dim]
    return rows.reshape(count * gap.slot.block, *others).movedim(0, gap.slot.dim).contiguous()


class Alike(Weights):
    """Confusion channels from the distribution of `random_subject`'s own: nobody can tell them."""

    name: ClassVar[str] = "planted-alike"

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        return [self._values(gap, rng) for gap in neurons.gaps]

    def _values(self, gap: Gap, rng: np.random.Generator) -> Tensor:
        role, dtype = gap.slot.role, gap.victim.dtype
        centre = CENTRE.get(role, 0.0)
        if role in (Role.MEAN, Role.VARIANCE):
            return torch.full(gap.shape, centre, dtype=dtype)
        return torch.from_numpy(rng.normal(centre, DEVIATION, gap.shape)).to(dtype)


def random_subject(attacker: int) -> Subject:
    """A victim all of whose weights are independent, with labels at random, and its sites.

    Args:
        attacker: Examples in the attacker's part.
    """
    generator = torch.Generator().manual_seed(SEED)
    model = TinyNet().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, DEVIATION, generator=generator)
        for norm in norms(model):
            norm.weight.add_(1)
    subject = Subject.of(tiny_victim(model, attacker, generator))
    victim = subject.victim

    def shuffled(images: Examples) -> Examples:
        count = (len(images),)
        return Examples(images.inputs, torch.randint(CLASSES, count, generator=generator))

    victim = replace(
        victim,
        defender=shuffled(victim.defender),
        attacker=shuffled(victim.attacker),
        judge=shuffled(victim.judge),
    )
    return replace(subject, victim=victim)


def planted_defense(weakness: Weakness) -> Defense:
    """A defense with one weakness."""
    return Defense(name=weakness, placement=PlantedPlacement(), weights=PlantedWeights(weakness=weakness))


@cache
def planted_subject(attacker: int) -> Subject:
    """A victim whose weights have the structure of trained ones, and its sites.

    Args:
        attacker: Examples in the attacker's part.
    """
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = TinyNet()
        profile = torch.ones(3)
        for conv, norm in zip((model.conv1, model.conv2, model.conv3), norms(model), strict=True):
            conv.weight.copy_(_structured(conv, profile, generator))
            profile = torch.randn(conv.out_channels, generator=generator).mul(0.7).exp()
            norm.weight.copy_(profile)
            norm.bias.uniform_(-0.5, 0.5, generator=generator)
        model.fc.weight.mul_(profile)
    return settled(model, attacker)


def _structured(conv: nn.Conv2d, profile: Tensor, generator: torch.Generator) -> Tensor:
    """Kernels of low rank over smooth shapes, with a scale for every input."""
    out, inputs = conv.out_channels, conv.in_channels
    smooth = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.5, 2.0], [2.0, 1.5, 1.0]])
    shapes = torch.einsum("ra,rb->rab", smooth, smooth.flip(0))
    left = torch.randn(out, RANK, generator=generator)
    right = torch.randn(RANK, inputs, generator=generator)
    kernels = torch.einsum("or,ri,rab->oiab", left, right, shapes) * profile[:, None, None]
    kernels = kernels / kernels.square().mean().sqrt() / (9 * inputs) ** 0.5
    structured: Tensor = kernels + 0.02 * kernels.std() * torch.randn(kernels.shape, generator=generator)
    return structured
