"""Rows outside the subspace that the others span."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors


class Subspace(Attack):
    """Suspect channels with little of their energy in the leading subspace of the layer's other channels.

    Trained rows lie near a small subspace; noise lies anywhere. Each row is compared to the others without
    it (`deepenc.analysis.features.statistics.subspace`). Needs no data.
    """

    name: ClassVar[str] = "subspace"
    detects: ClassVar[Weakness | None] = "noise"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("subspace_in", "subspace_out"))
        return Claim(scores={name: -standardised(table).sum(dim=1) for name, table in tables.items()})
