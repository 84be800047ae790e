"""Weights: sampled from the layer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from deepenc.encryption.defense import Neurons, Weights
from deepenc.encryption.filling.fills import NormSource, sample


class Samp(Weights):
    """Every entry drawn from the original entries of the same tensor.

    Draws are independent and with replacement; a bias is drawn from the bias vector. Resists fine-tuning
    less than `init`, but hides better, says the paper; each drawn float is bit-identical to another one of
    its tensor, though, which gives it away at once.

    Source: paper, Section 2.2, "samp"; it is silent about normalisation layers, see ``norm_source``.
    """

    name: ClassVar[str] = "samp"
    per_tensor: ClassVar[bool] = True

    norm_source: NormSource = "independent"
    """How BatchNorm's four vectors are drawn: each by itself (the literal reading), or ``"joint"``, all from
    one real channel. It decides almost everything: a CIFAR-10 ResNet-20 at 5 % keeps 7 to 89 % of accuracy
    with the first, depending on the key, and 81 to 91 % with the second."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """Sample all gaps."""
        return sample(neurons, rng, self.norm_source, channels)
