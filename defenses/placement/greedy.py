"""Placement: Equation 1 raised one step at a time."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.budget import caps, grow
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.response.ascent import climb
from deepenc.encryption.response.searched import MeasuredPlacement


class Greedy(MeasuredPlacement):
    """Channels one step at a time, where the outputs then change most per bit.

    Starting from nothing, the step is taken at the site where the mean distance of the outputs rises most
    for the memory it costs; old gains are taken for bounds, and only the largest is re-estimated (lazy
    greedy, Minoux 1978). Channels are filled by ``weights`` for the search alone: the released ones are
    drawn again. Source: paper, Equation 1, which it states but does not optimise.
    """

    name: ClassVar[str] = "greedy"

    step: int = Field(1, ge=1)
    """Channels added at a time; fewer where no more fit."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate step by step.

        Raises:
            ConfigError: There are no images, or the budget is below one channel.
        """
        ledger = self.ledger(original)
        most = caps(ledger, self.widest)
        candidates = self.candidates(original, rng, most)
        chosen = climb(candidates, ledger, {}, self.step)
        return grow(ledger, chosen, lambda site, count, price: 1 / price)
