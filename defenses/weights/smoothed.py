"""Weights: sampled from the layer's own, without equal floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, distinct


class Smoothed(Weights):
    """Every entry drawn like `samp`'s, but none equal to one of the victim's, bit for bit.

    Values that a share of the tensor has, such as the zeros of a pruned network, stay as they are. In half
    precision, and in tensors of millions, real floats repeat by accident, and then these may, too.

    Answers counting equal floats. What still tells these channels: entries that do not depend on each other,
    thus rough kernels and no profile over the layer's inputs.
    """

    name: ClassVar[str] = "smoothed"
    per_tensor: ClassVar[bool] = True

    form: Literal["jitter", "density"] = "jitter"
    """Multiply drawn entries by 1 + ``jitter`` N, or draw from the tensor's distribution function, straight
    between neighbouring values."""
    jitter: float = Field(0.05, gt=0, le=0.5)
    """Relative deviation; of normalisation entries in either form."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries come from one real channel, from several, or are defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        models = distinct(neurons.site.width, neurons.count, channels)
        density = self.form == "density"

        def draw(gap: Gap, real: Tensor) -> Tensor:
            shape = (neurons.count, *real.shape[1:])
            pool = gap.victim.detach().reshape(-1)
            if density:
                return between(pool, rng.random(shape))
            index = torch.from_numpy(rng.integers(len(pool), size=shape))
            return pool[index.to(pool.device)]

        weight_jitter = 0.0 if density else None
        return assemble(
            neurons,
            rng,
            draw,
            models,
            norm_source=self.norm_source,
            jitter=self.jitter,
            weight_jitter=weight_jitter,
        )


def between(pool: Tensor, uniform: np.ndarray) -> Tensor:
    """Quantiles of a pool of values, interpolated between neighbours.

    Args:
        pool: ``(values,)``.
        uniform: Any shape, in [0, 1).

    Returns:
        A tensor of the shape of ``uniform``.
    """
    ordered = pool.to(torch.promote_types(pool.dtype, torch.float32)).sort().values
    place = torch.from_numpy(uniform * (len(pool) - 1)).to(pool.device)
    lower = place.long()
    low, high = ordered[lower], ordered[(lower + 1).clamp_max(len(pool) - 1)]
    return low + (high - low) * (place - lower).to(low.dtype)
