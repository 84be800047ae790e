"""Weights: freshly initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor

from deepenc.encryption.defense import Neurons, Weights
from deepenc.encryption.filling.fills import initialise


class Init(Weights):
    """Kaiming initialisation, with the layer's defaults for all but weights.

    Normal with variance ``2 / fan_in``, the fan of the victim's own shape; outgoing weights likewise, with
    the fan of the layer they belong to. Scales and variances are 1; biases, shifts and means 0. Resists
    fine-tuning better than `samp`, but is easier to detect, says the paper.

    Source: paper, Section 2.2, "init"; He et al. 2015, Equation 10.
    """

    name: ClassVar[str] = "init"
    per_tensor: ClassVar[bool] = True

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """Initialise all gaps."""
        return initialise(neurons, rng)
