"""Placement: all channels in one site or one block."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.allocation import Patterns, proportional, same_memory, select
from deepenc.encryption.defense import Allocation, Original, Placement
from deepenc.errors import ConfigError, near
from deepenc.network.sites import Site


class Single(Placement):
    """All channels in one site, or in the sites of one block.

    They cost the memory closest to that of placing the proportion at every site of the network, so that
    spreading and concentrating compare at equal cost. Early blocks are cheap and disturb all that
    follows, but an attacker may throw the block away and train another.

    Source: paper, Section 3.1.1 and Figure 3.
    """

    name: ClassVar[str] = "single"

    proportion: float = Field(0.05, gt=0, le=1, allow_inf_nan=False)
    """Confusion channels per real channel over all of ``sites``, in (0, 1], whose memory is spent."""
    block: str | None = Field(None, coerce_numbers_to_str=True)
    """Prefix of names (``"layer1.0"``): all sites of that block share the channels evenly. Default: the
    first site alone."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"*.conv1"``): the sites that set the memory, and to choose from."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate all channels at the chosen site or block."""
        pool = select(original.sites, self.sites)
        chosen = pool[:1] if self.block is None else _within(pool, self.block)
        count = same_memory(original, chosen, proportional(pool, self.proportion))
        return {site.name: count for site in chosen}


def _within(sites: tuple[Site, ...], block: str) -> tuple[Site, ...]:
    chosen = tuple(s for s in sites if s.name == block or s.name.startswith(block + "."))
    if not chosen:
        parts = {s.name.rsplit(".", depth)[0] for s in sites for depth in range(s.name.count(".") + 1)}
        raise ConfigError(f"no site lies in block {block!r}: {near(block, parts)}")
    return chosen
