"""Placement: the more channels the earlier the site."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.allocation import Patterns, select
from deepenc.encryption.cost.budget import Budget, Ledger, grow
from deepenc.encryption.defense import Allocation, Original, Placement
from deepenc.network.sites import Site


class Shallow(Placement):
    """Channels in proportion to width, by a factor fewer at each site after the first.

    Each channel goes where the site has fewest for its due (its width times ``decay`` to the power of its
    place), until no further channel fits anywhere. Early channels disturb all that follows, and are cheap
    where early layers are narrow.
    """

    name: ClassVar[str] = "shallow"

    budget: Budget = Budget(share=0.05)
    """What the channels may cost: ``5%`` of the memory, ``{bytes: 20000}``, ``{parameters: 1000}``."""
    decay: float = Field(0.8, gt=0, le=1)
    """A site's confusion channels per real channel, relative to those of the site before it."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"layer1.*"``); the sites that match any may be widened."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate from the first site to the last.

        Raises:
            ConfigError: The budget is below one channel.
        """
        ledger = Ledger(original, self.budget, select(original.sites, self.sites))
        # A floor keeps the dues of very deep networks above 0.
        due = {s.name: s.width * max(self.decay**place, 1e-12) for place, s in enumerate(ledger.sites)}

        def wanting(site: Site, count: int, price: int) -> float:
            return due[site.name] / (count + 1)

        return grow(ledger, {}, wanting)
