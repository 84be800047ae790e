"""Norms too near the middle."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim
from deepenc.network.structure import named_tensors


class Typical(Attack):
    """Suspect channels whose norms are too near the middle: the mirror of `norms`.

    The sum of a thousand weights drawn one by one hardly varies; the norms of trained channels do. A
    channel's score is minus the sum of its robust z-scores, by absolute value, of the logarithms of its two
    norms. Needs no data.
    """

    name: ClassVar[str] = "typical"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("norm_in", "norm_out"))
        return Claim(scores={name: -standardised(t).abs().sum(dim=1) for name, t in tables.items()})
