"""A plain defense around a plugin under check: two channels a site, noise for weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deepenc.encryption.defense import Allocation, Defense, Hardening, Neurons, Original, Placement, Weights
from deepenc.network.sites import Role


class TwoEach(Placement):
    """Two confusion channels at every site."""

    name: ClassVar[str] = "two-each"

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """See `Placement.place`."""
        return {site.name: 2 for site in original.sites}


class Noise(Weights):
    """Normal numbers with the deviation of the victim's tensor; variances are made positive."""

    name: ClassVar[str] = "noise"

    def fill(self, neurons: Neurons, rng: np.random.Generator) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        values = []
        for gap in neurons.gaps:
            scale = float(gap.victim.double().square().mean().sqrt())
            drawn = torch.from_numpy(rng.normal(0, scale, gap.shape)).to(gap.victim.dtype)
            values.append(drawn.abs() + 1e-3 if gap.slot.role is Role.VARIANCE else drawn)
        return values


def host_defense(
    placement: Placement | None = None,
    weights: Weights | None = None,
    hardening: Hardening | None = None,
) -> Defense:
    """A defense of the plugin under check, with plain parts for the rest."""
    return Defense(
        name="host",
        placement=placement or TwoEach(),
        weights=weights or Noise(),
        hardening=() if hardening is None else (hardening,),
    )
