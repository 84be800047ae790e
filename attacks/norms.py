"""Outliers among the norms of the weights."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors


class Norms(Attack):
    """Suspect channels whose incoming or outgoing weights have an unusual norm.

    A channel's score is the larger of its two robust z-scores, by absolute value, of the logarithm of the
    Euclidean norm among the channels of its site. Channels that weight decay left without weights are not
    suspected: trained networks have them. Needs no data.
    """

    name: ClassVar[str] = "norms"
    detects: ClassVar[Weakness | None] = "loud"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("norm_in", "norm_out"))
        return Claim(scores={n: standardised(t).abs().amax(dim=1) * t.alive for n, t in tables.items()})
