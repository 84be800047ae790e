"""Placement: Equation 1 raised one step at a time."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.allocation import Patterns, select
from deepenc.encryption.cost.budget import Budget, Ledger, caps, grow
from deepenc.encryption.defense import Allocation, Original, Placement, Weights
from deepenc.encryption.response.ascent import climb
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.measure import Measure
from deepenc.plugins import build


class Greedy(Placement):
    """Channels one step at a time, where the outputs then change most per bit.

    Starting from nothing, the step is taken at the site where the mean distance of the outputs rises most
    for the memory it costs; old gains are taken for bounds, and only the largest is measured anew (lazy
    greedy, Minoux 1978). Channels are filled by ``weights`` for the search alone: the released ones are
    drawn anew. Source: paper, Equation 1, which it states but does not optimise.
    """

    name: ClassVar[str] = "greedy"

    budget: Budget = Budget(share=0.05)
    """What the channels may cost: ``5%`` of the memory, ``{bytes: 20000}``, ``{parameters: 1000}``."""
    weights: Weights = Field(default_factory=lambda: build("weights", "samp"))
    """Fills the channels whose effect is measured; best those of the defense."""
    images: int = Field(64, ge=2)
    """The defender's images to measure on, at most."""
    step: int = Field(1, ge=1)
    """Channels added at a time; fewer where no more fit."""
    widest: float = Field(1.0, gt=0, le=16)
    """Confusion channels per real channel of a site, at most, while other sites have room."""
    measure: Measure = "logits"
    """What is compared: ``logits``, ``probabilities``, ``features``, or ``features:NAME`` of a layer."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"layer1.*"``); the sites that match any may be widened."""

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate step by step.

        Raises:
            ConfigError: There are no images, or the budget is below one channel.
        """
        ledger = Ledger(original, self.budget, select(original.sites, self.sites))
        most = caps(ledger, self.widest)
        blame = f"placement {self.name!r}"
        candidates = Candidates.of(
            original, self.weights, rng, most, images=self.images, measure=self.measure, blame=blame
        )
        chosen = climb(candidates, ledger, {}, self.step)
        return grow(ledger, chosen, lambda site, count, price: 1 / price)
