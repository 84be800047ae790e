"""Placement: as many bits of key as the budget buys."""

from __future__ import annotations

from math import log2
from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.budget import caps, grow
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.response.ascent import climb
from deepenc.encryption.response.searched import MeasuredPlacement
from deepenc.errors import ConfigError
from deepenc.network.sites import Site


class MaxEntropy(MeasuredPlacement):
    """As many key bits as the budget buys, if wanted above a least response.

    A site of C channels and d confusion channels gives log2 of C + d choose d bits of key. Each channel
    goes where it adds most for what it costs, which is exact for such concave gains but for the last
    channels, and for what neighbouring sites cost each other. With ``floor`` channels are first placed by
    Equation 1, one at a time, until the response is reached, and the rest of the budget then buys key
    bits.
    """

    name: ClassVar[str] = "max-entropy"

    floor: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Least squared response change relative to the outputs' own squares; above 0 it needs images.
    Without, ``weights``, ``images``, ``widest`` and ``measure`` are not used."""

    @property
    def wants_data(self) -> bool:
        """For the floor."""
        return self.floor > 0

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate where a channel adds most key bits for what it costs.

        Raises:
            ConfigError: The budget is below one channel; or a floor was given and there are no images, or
                the budget does not reach it.
        """
        ledger = self.ledger(original)
        if not self.floor:
            return grow(ledger, {}, _bits_per_price)
        most = caps(ledger, self.widest)
        candidates = self.candidates(original, rng, most, " with a floor")
        least = climb(candidates, ledger, {}, enough=self.floor)
        chosen = grow(ledger, least, _bits_per_price, most)
        reached = candidates.response(chosen).relative
        if not reached >= self.floor:
            raise ConfigError(
                f"placement 'max-entropy': the budget reaches a relative response of {reached:.3g}, below "
                f"the floor of {self.floor:.3g}; ask for a lower floor or give a larger budget"
            )
        return chosen


def _bits_per_price(site: Site, count: int, price: int) -> float:
    """Key bits that one more channel adds, per unit of its price."""
    return log2((site.width + count + 1) / (count + 1)) / price
