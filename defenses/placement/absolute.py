"""Placement: the same number of channels at every site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from deepenc.encryption.cost.allocation import Patterns, proportional, same_memory, select
from deepenc.encryption.defense import Allocation, Original, Placement


class Absolute(Placement):
    """The same number of channels at every site; the paper's choice.

    Give the number, or a proportion: then it is the one number that costs the memory closest to that of
    placing the proportion at every site (5 % where neither is given).

    Source: paper, Section 3.1.1; its Table 1 comes from 5 to 35 channels at every site.
    """

    name: ClassVar[str] = "absolute"

    count: int | None = Field(None, ge=1, le=2**16)
    """Confusion channels at every site."""
    proportion: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    """Instead of a count: confusion channels per real channel, in (0, 1], whose memory is matched."""
    sites: Patterns = ("*",)
    """Patterns of site names (``"layer1.*"``); the sites that match any are widened."""

    @model_validator(mode="before")
    @classmethod
    def _default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("count") is None and data.get("proportion") is None:
            return {**data, "proportion": 0.05}
        return data

    @model_validator(mode="after")
    def _one_of_two(self) -> Absolute:
        if self.count is not None and self.proportion is not None:
            raise ValueError("give a count or a proportion, not both")
        return self

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate the number at every chosen site."""
        chosen = select(original.sites, self.sites)
        count = self.count
        if count is None:
            assert self.proportion is not None
            count = same_memory(original, chosen, proportional(chosen, self.proportion))
        return {site.name: count for site in chosen}
