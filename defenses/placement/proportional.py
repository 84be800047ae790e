"""Placement: the same proportion at every site."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from deepenc.encryption.cost.allocation import Patterns, proportional, select
from deepenc.encryption.defense import Allocation, Original, Placement


class Proportional(Placement):
    """The same proportion of its width at every site.

    ΔC is the proportion of C, rounded half up, and at least 1. "5 %" is not 5 % of the memory: where
    two sites meet in one tensor it grows along both dimensions (see `deepenc.memory`).

    Source: paper, Section 3.1.1 ("keep the confusion proportion identical at all layers").
    """

    name: ClassVar[str] = "proportional"

    proportion: float = Field(0.05, gt=0, le=1, allow_inf_nan=False)
    """Confusion channels per real channel, in (0, 1]."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"layer1.*"``); the sites that match any are widened."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate the proportion at every chosen site."""
        return proportional(select(original.sites, self.sites), self.proportion)
