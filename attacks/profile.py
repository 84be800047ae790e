"""Rows that ignore which inputs are large."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors


class Profile(Attack):
    """Suspect channels that ignore which inputs get large weights, and which small ones, from all others.

    The statistic is a likelihood ratio for each side: are a channel's weights scaled input by input (output
    by output) as the other channels' are, or all alike? Needs no data, nor kernels: it works on 1x1
    convolutions and linear layers too.
    """

    name: ClassVar[str] = "profile"
    detects: ClassVar[Weakness | None] = "noise"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("profile_in", "profile_out"))
        return Claim(scores={name: -standardised(table).sum(dim=1) for name, table in tables.items()})
