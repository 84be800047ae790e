"""The two ways in which the paper fills confusion channels, for any plugin to use (Section 2.2)."""

from __future__ import annotations

from math import prod, sqrt
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons
from deepenc.network.sites import Role

Norms = Literal["independent", "joint"]
"""Whether the vectors of a normalisation are drawn each by itself, or all from one real channel."""

_NORM = {Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE}
_DEFAULTS = {Role.BIAS: 0.0, Role.SCALE: 1.0, Role.SHIFT: 0.0, Role.MEAN: 0.0, Role.VARIANCE: 1.0}


def sample(
    neurons: Neurons,
    rng: np.random.Generator,
    norms: Norms = "independent",
    channels: np.random.Generator | None = None,
) -> list[Tensor]:
    """Draw every entry, with replacement, from the original entries of the same tensor.

    Args:
        neurons: What to fill.
        rng: The only source of randomness.
        norms: With ``"joint"``, the normalisation vectors of a neuron all come from one real channel.
        channels: Chooses those real channels; default: ``rng``.

    Returns:
        A tensor of ``gap.shape`` for each gap.
    """
    models = (channels or rng).integers(neurons.site.width, size=neurons.count) if norms == "joint" else None
    values = []
    for gap in neurons.gaps:
        if models is not None and gap.slot.role in _NORM and _is_vector(gap):
            entries = gap.slot.start + models[:, None] * gap.slot.block + np.arange(gap.slot.block)
            index = torch.from_numpy(entries.ravel()).to(gap.victim.device)
            values.append(gap.victim.index_select(gap.slot.dim, index))
        else:
            pool = gap.victim.reshape(-1)
            kind = np.int32 if len(pool) < 2**31 else np.int64  # half the random bits, half the time
            index = torch.from_numpy(rng.integers(len(pool), size=prod(gap.shape), dtype=kind))
            values.append(pool.index_select(0, index.to(pool.device)).reshape(gap.shape))
    return values


def _is_vector(gap: Gap) -> bool:
    return gap.victim.numel() == gap.victim.shape[gap.slot.dim]


def initialise(neurons: Neurons, rng: np.random.Generator) -> list[Tensor]:
    """Draw weights by Kaiming initialisation (He et al. 2015), and set all else to the layer's defaults.

    Weights are normal with mean 0 and variance ``2 / fan_in``; scales and variances 1; biases, shifts
    and means 0.

    Args:
        neurons: What to fill.
        rng: The only source of randomness.

    Returns:
        A tensor of ``gap.shape`` for each gap.
    """
    values = []
    for gap in neurons.gaps:
        if gap.slot.role in _DEFAULTS:
            values.append(gap.victim.new_full(gap.shape, _DEFAULTS[gap.slot.role]))
        else:
            normal = rng.standard_normal(gap.shape, dtype=np.float32) * np.float32(sqrt(2 / fan_in(gap)))
            values.append(torch.from_numpy(normal).to(gap.victim))
    return values


def fan_in(gap: Gap) -> int:
    """Inputs of one output of the victim's layer, from the shape of its weights, ``(out, in, ...)`` or not.

    An incoming slot lies along the layer's outputs, an outgoing one along its inputs, whichever comes
    first in the tensor.
    """
    shape, dim = gap.victim.shape, gap.slot.dim
    if len(shape) < 2:
        return gap.victim.numel()
    outputs = dim if gap.slot.role is Role.INCOMING else 1 if dim == 0 else 0
    return gap.victim.numel() // shape[outputs]
