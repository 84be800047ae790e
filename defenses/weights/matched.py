"""Weights: sampled, with the moments and norms that real neurons have together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, distinct, picked


class Matched(Weights):
    """Sampled rows with the means and deviations of one real neuron's rows, in every layer it touches.

    Entries are drawn from the layer's own, each measured in the mean and deviation of its row, and given
    those of the model's row instead. So every row has the mean, deviation and norm of a real one, entries are
    as peaked as real ones within their row, and incoming norms go with outgoing ones and with scales as in
    the victim. In norms, confusion channels are neither outliers nor all alike, as those of `samp` are.

    What still tells: entries that do not depend on each other, thus rough kernels and no profile. Patterns of
    zeros are lost.
    """

    name: ClassVar[str] = "matched"
    per_tensor: ClassVar[bool] = True

    jitter: float = Field(0.05, gt=0, le=0.5)
    """Relative deviation of a row's mean and deviation, and of normalisation entries, from the model's."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries are the model's, of real channels drawn for each vector, or
    defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        models = distinct(neurons.site.width, neurons.count, channels)

        def draw(gap: Gap, real: Tensor) -> Tensor:
            rows = real.to(torch.promote_types(real.dtype, torch.float32))
            shape = (neurons.count, *rows.shape[1:])
            mean, deviation = moments(rows)
            pool = ((rows - mean) / deviation.clamp_min(1e-30)).reshape(-1)
            index = torch.from_numpy(rng.integers(len(pool), size=shape))
            drawn = pool[index.to(pool.device)]
            own = moments(drawn)
            unit = (drawn - own[0]) / own[1].clamp_min(1e-30)
            factors = 1 + self.jitter * torch.from_numpy(rng.standard_normal((2, neurons.count, 1, 1)))
            shift, stretch = factors.clamp_min(0.05).to(rows)
            matched: Tensor = shift * picked(mean, models) + stretch * picked(deviation, models) * unit
            return matched

        return assemble(
            neurons,
            rng,
            draw,
            models,
            norm_source=self.norm_source,
            jitter=self.jitter,
            weight_jitter=0.0,
        )


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each row of ``(rows, partners, unit)``, each ``(rows, 1, 1)``."""
    mean = rows.mean((1, 2), keepdim=True)
    return mean, (rows - mean).square().mean((1, 2), keepdim=True).sqrt()
