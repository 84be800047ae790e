"""Hardening: the victim's own channels in another order and of other sizes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.defense import Hardening, Original
from deepenc.network.arrangement import LARGEST, Arrangement


class Permute(Hardening):
    """Put the victim's channels in a secret order, and rescale them by secret powers of two.

    Both are undone bit for bit with the key, and change nothing of what the network computes: sites where
    they would are left as they are, and where only the sizes would (behind anything that bends, as a GELU
    does), only the order changes. It answers whoever compares the release with a known network entry by
    entry, or looks at norms across channels. It hides nothing from whoever matches directions of weights
    (`releases`, `public-checkpoint`), adds nothing to the key's bits, and confusion channels, filled
    afterwards, are as conspicuous as before.
    """

    name: ClassVar[str] = "permute"

    powers: int = Field(1, ge=0, le=LARGEST)
    """Largest exponent: a channel's values are multiplied by 2 to the power of a number between plus and
    minus this; 0 changes the order alone."""

    def arrange(self, original: Original, rng: np.random.Generator) -> Arrangement:
        """See `Hardening.arrange`."""
        order, powers = {}, {}
        for site in original.sites:
            order[site.name] = tuple(rng.permutation(site.width).tolist())
            if self.powers:
                drawn = rng.integers(-self.powers, self.powers + 1, size=site.width)
                powers[site.name] = tuple(drawn.tolist())
        return Arrangement(order, powers)
