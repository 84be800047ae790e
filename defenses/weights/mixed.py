"""Weights: each neuron sampled or initialised, by a coin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepenc.encryption.defense import Neurons, Weights
from deepenc.encryption.filling.fills import NormSource, initialise, sample


class Mixed(Weights):
    """Each neuron is sampled or initialised, with probability 1/2.

    One coin a neuron: its incoming and outgoing weights, and all its other entries, are made in the same way.

    Source: paper, Section 2.2, "mixed": "each neuron has 50 % probability".
    """

    name: ClassVar[str] = "mixed"
    per_tensor: ClassVar[bool] = True

    norm_source: NormSource = "independent"
    """How BatchNorm's four vectors are sampled: each by itself, or ``"joint"``, all from one real channel."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """Fill all gaps both ways and let each neuron's coin choose, the same in each tensor."""
        heads = torch.from_numpy(channels.random(neurons.count) < 0.5)
        sampled = sample(neurons, rng, self.norm_source, channels)
        pairs = zip(neurons.gaps, sampled, initialise(neurons, rng), strict=True)
        values = []
        for gap, drawn, fresh in pairs:
            coins = gap.slot.along(heads, len(gap.shape)).to(gap.victim.device)
            values.append(torch.where(coins, drawn, fresh))
        return values
