"""Weights: each neuron sampled or initialised, by a coin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.fills import Norms, initialise, sample


class Mixed(Weights):
    """Each neuron is sampled or initialised, with probability 1/2.

    One coin a neuron: its incoming and outgoing weights, and all its other entries, are made in the same way.

    Source: paper, Section 2.2, "mixed": "each neuron has 50 % probability".
    """

    name: ClassVar[str] = "mixed"

    norms: Norms = "independent"
    """How BatchNorm's four vectors are sampled: each by itself, or ``"joint"``, all from one real channel."""

    def fill(self, neurons: Neurons, rng: np.random.Generator) -> Sequence[Tensor]:
        """Fill all gaps both ways and let each neuron's coin choose."""
        heads = torch.from_numpy(rng.random(neurons.count) < 0.5)
        pairs = zip(neurons.gaps, sample(neurons, rng, self.norms), initialise(neurons, rng), strict=True)
        return [torch.where(_spread(heads, gap), sampled, fresh) for gap, sampled, fresh in pairs]


def _spread(heads: Tensor, gap: Gap) -> Tensor:
    """The coins along the slot's dimension, each over its neuron's block; broadcasts to ``gap.shape``."""
    shape = [1] * len(gap.shape)
    shape[gap.slot.dim] = -1
    return heads.repeat_interleave(gap.slot.block).reshape(shape).to(gap.victim.device)
