"""Weights: whole kernels of the layer's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, distinct, picked


class Kernels(Weights):
    """Every kernel drawn whole from the same tensor's kernels.

    A kernel is what a channel has with one channel of the other layer: k x k entries of a convolution, the
    block of a flattened map. Where that is one number (a linear layer, a 1x1 convolution), the row or column
    of one real channel is kept together.

    Answers tests of roughness and, with jitter, of equal floats. What still tells: strong and weak inputs are
    mixed up, rows lie in no common subspace; rows of linear layers are near copies.
    """

    name: ClassVar[str] = "kernels"
    per_tensor: ClassVar[bool] = True

    jitter: float = Field(0.1, ge=0, le=0.5)
    """Relative deviation of each entry from the one drawn; with 0 floats are equal."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries come from one real channel, from several, or are defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        models = distinct(neurons.site.width, neurons.count, channels)

        def draw(gap: Gap, real: Tensor) -> Tensor:
            width, partners, unit = real.shape
            if unit == 1:
                return picked(real, distinct(width, neurons.count, rng))
            index = torch.from_numpy(rng.integers(width * partners, size=(neurons.count, partners)))
            return real.reshape(-1, unit)[index.to(real.device)]

        return assemble(neurons, rng, draw, models, norm_source=self.norm_source, jitter=self.jitter)
