"""Rows that are like no other, or too much like one."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors


class Alignment(Attack):
    """Suspect channels by the largest cosine of their weights with those of any other channel of the site.

    In many dimensions noise is at right angles to everything, while trained channels resemble one another;
    a clone of a trained channel resembles it too much. Needs no data.
    """

    name: ClassVar[str] = "alignment"

    look_for: Literal["random", "clone", "both"] = "random"
    """Low cosines (channels drawn at random), high ones (clones, decoys), or whatever is unusual."""

    @property
    def detects(self) -> Weakness | None:  # type: ignore[override]
        """Noise; in small layers trained channels are as much alike as clones are."""
        return None if self.look_for == "clone" else "noise"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, ("cosine_in", "cosine_out"))
        return Claim(scores={name: self._score(standardised(table)) for name, table in tables.items()})

    def _score(self, away: Tensor) -> Tensor:
        if self.look_for == "both":
            return away.abs().sum(dim=1)
        return away.sum(dim=1) if self.look_for == "clone" else -away.sum(dim=1)
