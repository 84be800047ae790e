"""Weights: each neuron sampled or initialised, by a coin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import Norms, initialise, sample


class Mixed(Weights):
    """Each neuron is sampled or initialised, with probability 1/2.

    One coin a neuron: its incoming and outgoing weights, and all its other entries, are made in the same way.

    Source: paper, Section 2.2, "mixed": "each neuron has 50 % probability".
    """

    name: ClassVar[str] = "mixed"
    per_tensor: ClassVar[bool] = True

    norms: Norms = "independent"
    """How BatchNorm's four vectors are sampled: each by itself, or ``"joint"``, all from one real channel."""

    def fill(self, neurons: Neurons, rng: np.random.Generator) -> Sequence[Tensor]:
        """Fill all gaps both ways and let each neuron's coin choose."""
        return self.fill_tensor(neurons, rng, rng)

    def fill_tensor(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """Fill one tensor's gaps; a neuron's coin is the same in each tensor."""
        heads = torch.from_numpy(channels.random(neurons.count) < 0.5)
        sampled = sample(neurons, rng, self.norms, channels)
        pairs = zip(neurons.gaps, sampled, initialise(neurons, rng), strict=True)
        return [torch.where(_spread(heads, gap), drawn, fresh) for gap, drawn, fresh in pairs]


def _spread(heads: Tensor, gap: Gap) -> Tensor:
    """The coins along the slot's dimension, each over its neuron's block; broadcasts to ``gap.shape``."""
    shape = [1] * len(gap.shape)
    shape[gap.slot.dim] = -1
    return heads.repeat_interleave(gap.slot.block).reshape(shape).to(gap.victim.device)
