"""Kernels that are not smooth."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors


class Roughness(Attack):
    """Suspect channels whose kernels are rough: trained ones are smooth, noise is not.

    The statistic is Moran's: products of adjacent taps, over the energy. Sites without kernels larger than
    1x1 are left alone. Needs no data.
    """

    name: ClassVar[str] = "roughness"
    detects: ClassVar[Weakness | None] = "noise"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("roughness_in", "roughness_out"))
        return Claim(scores={name: standardised(table).sum(dim=1) for name, table in tables.items()})
