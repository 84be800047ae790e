"""Normalisation entries as a layer starts: nobody trained them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.sites import Role
from deepenc.network.structure import named_tensors

DEFAULTS = {Role.SCALE: 1.0, Role.SHIFT: 0.0, Role.MEAN: 0.0, Role.VARIANCE: 1.0, Role.BIAS: 0.0}
"""What a layer starts with."""


class BatchNormDefaults(Attack):
    """Suspect channels whose scale, shift, running statistics or bias are a layer's defaults, or nearly.

    Each vector of the site votes with a number in [0, 1] for every channel: 1 for the default itself,
    one half at `tolerance`. Needs no data; where all channels are at the defaults nothing is said.
    """

    name: ClassVar[str] = "batchnorm-defaults"
    detects: ClassVar[Weakness | None] = "defaults"

    tolerance: float = Field(0.01, gt=0, allow_inf_nan=False)
    """Distance from the default that counts half, as a share of the site's median distance, ``> 0``."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tensors = named_tensors(case.encrypted)
        scores = {}
        for site in case.sites:
            votes = [
                nearness(rows.detach().double().cpu(), default, self.tolerance)
                for role, default in DEFAULTS.items()
                for _, rows in site.rows(tensors, role)
            ]
            scores[site.name] = torch.stack(votes).mean(dim=0) if votes else torch.zeros(site.width).double()
        return Claim(scores=scores)


def nearness(rows: Tensor, default: float, tolerance: float) -> Tensor:
    """How near the default the entries are, ``(channels, entries)`` -> ``(channels,)`` in [0, 1]."""
    away = (rows.nan_to_num() - default).abs().amax(dim=1)
    typical = away[away > 0].median() if (away > 0).any() else away.new_ones(())
    return tolerance / (tolerance + away / typical)
