"""Weights: real neurons that say something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, distinct, picked
from deepenc.network.sites import Role


class Decoys(Weights):
    """Perturbed copies of real neurons whose outgoing weights are altered.

    A decoy is active when its model is, so that no statistic of activations or of incoming weights alone says
    which of the two is real, and running statistics are nearly right. What tells: near copies, and outgoing
    weights along one line; noisy ones also have larger norms.
    """

    name: ClassVar[str] = "decoys"
    per_tensor: ClassVar[bool] = True

    outgoing: Literal["negated", "noisy"] = "negated"
    """Outgoing weights: the model's times ``-strength``, or with noise of ``strength`` times their size."""
    strength: float = Field(1.0, gt=0, le=100, allow_inf_nan=False)
    """How much outgoing weights are altered; negated by 1 they silence the model."""
    jitter: float = Field(0.1, ge=0, le=0.5)
    """Relative deviation of each entry from the model's; with 0 floats are equal."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries are the model's, of real channels drawn for each vector, or
    defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        models = distinct(neurons.site.width, neurons.count, channels)

        def draw(gap: Gap, real: Tensor) -> Tensor:
            rows = picked(real, models)
            if gap.slot.role is Role.INCOMING:
                return rows
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if self.outgoing == "negated":
                return -self.strength * rows
            size = rows.square().mean((1, 2), keepdim=True).sqrt()
            noise = torch.from_numpy(rng.standard_normal(rows.shape)).to(rows)
            return rows + self.strength * size * noise

        return assemble(neurons, rng, draw, models, norm_source=self.norm_source, jitter=self.jitter)
