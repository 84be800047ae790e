"""How the distribution of a channel's weights differs from that of its whole layer."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from deepenc.analysis.features import Table, features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors

STATISTICS = {
    "ks": ("ks",),
    "ad": ("ad",),
    "energy": ("energy",),
    "moments": ("mean", "deviation", "skew", "kurtosis"),
}


class Distribution(Attack):
    """Compare the distribution of each channel's weights to that of its whole layer.

    Trained channels differ from one another, so that each is some way off the whole; weights drawn one by
    one from the whole are too close to it. Needs no data.
    """

    name: ClassVar[str] = "distribution"

    statistic: Literal["ks", "ad", "energy", "moments"] = "ks"
    """Distance: Kolmogorov-Smirnov, Anderson-Darling, energy distance, or how far the first four moments are
    from the site's median ones."""
    sign: Literal["typical", "outlier"] = "typical"
    """Whether those too close to the whole are suspect (drawn from it) or those far off (drawn otherwise)."""

    @property
    def detects(self) -> Weakness | None:  # type: ignore[override]
        """Loud channels are far off; nothing planted is so typical that no trained channel is more so."""
        return "loud" if self.sign == "outlier" else None

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        names = [f"{statistic}_{side}" for statistic in STATISTICS[self.statistic] for side in ("in", "out")]
        tables = features(named_tensors(case.encrypted), case.sites, names)
        return Claim(scores={name: self._score(table) for name, table in tables.items()})

    def _score(self, table: Table) -> Tensor:
        away = standardised(table)
        distance = (away.abs() if self.statistic == "moments" else away).sum(dim=1)
        score = distance if self.sign == "outlier" else -distance
        # What weight decay left of dead channels does no harm, whatever its distribution.
        return torch.where(table.alive, score, score.min())
