"""Hardening: running statistics that agree with data."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from deepenc.encryption.defense import Hardening, Original
from deepenc.encryption.filling.calibration import Path, calibrate
from deepenc.encryption.filling.inputs import draw
from deepenc.errors import ConfigError
from deepenc.network.surgery import Layout


class Calibrate(Hardening):
    """Give the confusion channels the BatchNorm statistics that the defender's data have there.

    Drawn statistics are wrong for what a confusion channel computes: whoever runs some images sees it, and
    re-estimating the statistics undoes the damage that rests on it. So calibrated, `samp` and `init` do
    hardly any damage: see `optimise`.
    """

    name: ClassVar[str] = "calibrate"

    path: Path = "clean"
    """Where to measure: with the confusion channels silent, or in the network as it is released. Along the
    second, confusion channels agree with data better than the real ones, which gives them away."""
    images: int = Field(256, ge=2)
    """Images to measure on, run at once."""

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def harden(
        self, network: nn.Module, layout: Layout, original: Original, rng: np.random.Generator
    ) -> None:
        """See `Hardening.harden`.

        Raises:
            ConfigError: There are no images, or no confusion channel has a BatchNorm.
        """
        inputs = draw(f"hardening {self.name!r}", network, original, rng, self.images)
        if not calibrate(network, layout, inputs, self.path):
            raise ConfigError(
                "hardening 'calibrate' changes nothing: no confusion channel has BatchNorm statistics in "
                f"{type(network).__name__}; leave it out"
            )
