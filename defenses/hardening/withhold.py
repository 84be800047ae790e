"""Hardening: a release whose running statistics say nothing of the victim."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from deepenc.analysis.batchnorm import batchnorms, reestimate
from deepenc.encryption.defense import Hardening, Original
from deepenc.encryption.filling.inputs import draw
from deepenc.network.surgery import Layout


class Withhold(Hardening):
    """Keep the victim's BatchNorm statistics with the key, and release those of the encrypted network.

    What real channels have stored tells what they saw in the victim: whoever removes channels until the
    layers behind agree with it reads off the key, layer by layer (`peel`, `hill-climb`). With this step all
    statistics are those that the confused network has on the defender's images: they agree with any data,
    re-estimating them changes little, and they are no measure of a guess. The price is a larger key, two
    numbers for each BatchNorm channel, and that damage must not rest on statistics: put `optimise` before it.
    With the key every tensor is the victim's, bit for bit. Without BatchNorm there is nothing to withhold.
    """

    name: ClassVar[str] = "withhold"

    images: int = Field(256, ge=2)
    """The defender's images to measure on, at most."""

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def withholds(self, original: Original) -> Collection[str]:
        """All running means and variances."""
        return [
            f"{path}.{kind}"
            for path in batchnorms(original.model)
            for kind in ("running_mean", "running_var")
        ]

    def harden(
        self, network: nn.Module, layout: Layout, original: Original, rng: np.random.Generator
    ) -> None:
        """See `Hardening.harden`.

        Raises:
            ConfigError: There are running statistics, but no images to re-estimate them on.
        """
        layers = batchnorms(network).values()
        if not layers:
            return
        counts = [layer.num_batches_tracked for layer in layers]
        before = [None if count is None else count.clone() for count in counts]
        reestimate(network, draw(f"hardening {self.name!r}", network, original, rng, self.images))
        with torch.no_grad():
            for count, old in zip(counts, before, strict=True):
                if count is not None and old is not None:
                    count.copy_(old)
