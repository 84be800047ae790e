"""What placements that search for an allocation have in common."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.allocation import Patterns, select
from deepenc.encryption.cost.budget import Budget, Ledger
from deepenc.encryption.defense import Original, Placement, Weights
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.measure import Measure
from deepenc.plugins import build


class SearchedPlacement(Placement):
    """A placement that spends a budget where the outputs of the network then change most."""

    budget: Budget = Budget(share=0.05)
    """What the channels may cost: ``5%`` of the memory, ``{bytes: 20000}``, ``{parameters: 1000}``."""
    weights: Weights = Field(default_factory=lambda: build("weights", "samp"))
    """Fills the channels whose effect is measured; best those of the defense."""
    images: int = Field(64, ge=2)
    """The defender's images to measure on, at most."""
    widest: float = Field(1.0, gt=0, le=16)
    """Confusion channels per real channel of a site, at most, while other sites have room."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"layer1.*"``); the sites that match any may be widened."""

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def ledger(self, original: Original) -> Ledger:
        """The budget for the chosen sites.

        Raises:
            ConfigError: It is below one channel, or a pattern matches no site.
        """
        return Ledger(original, self.budget, select(original.sites, self.sites))


class MeasuredPlacement(SearchedPlacement):
    """One that measures the response of candidate allocations."""

    measure: Measure = "logits"
    """What is compared: ``logits``, ``probabilities``, ``features``, or ``features:NAME`` of a layer."""

    def candidates(
        self, original: Original, rng: np.random.Generator, most: Mapping[str, int], why: str = ""
    ) -> Candidates:
        """Candidates of at most so many channels at each site.

        Args:
            original: The victim and the defender's data.
            rng: Fills them, and chooses images.
            most: The largest count for each site.
            why: Under which condition images are needed, for the message where there are none.

        Raises:
            ConfigError: There are no images.
        """
        return Candidates.of(
            original,
            self.weights,
            rng,
            most,
            images=self.images,
            blame=f"placement {self.name!r}{why}",
            measure=self.measure,
        )
