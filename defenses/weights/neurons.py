"""Weights: whole neurons, recombined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, distinct, picked
from deepenc.network.sites import Role


class Recombined(Weights):
    """Incoming weights, bias and norms of one real channel, outgoing weights of another.

    Each half of such a neuron is typical by any test of one half. What tells: both halves are near copies of
    real ones, so that looking for likeness finds pairs; and the halves' norms do not belong together.
    """

    name: ClassVar[str] = "neurons"
    per_tensor: ClassVar[bool] = True

    jitter: float = Field(0.1, ge=0, le=0.5)
    """Relative deviation of each entry from the one copied; with 0 floats are equal."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries are those of the channel that the incoming weights are of, of
    real channels drawn for each vector, or defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        width = neurons.site.width
        into = distinct(width, neurons.count, channels)
        # Any other channel than the first, where there is another.
        out = (into + channels.integers(1, max(width, 2), size=neurons.count)) % width

        def draw(gap: Gap, real: Tensor) -> Tensor:
            return picked(real, into if gap.slot.role is Role.INCOMING else out)

        return assemble(neurons, rng, draw, into, norm_source=self.norm_source, jitter=self.jitter)
