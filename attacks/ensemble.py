"""Several detectors as one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.stats import rankdata

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.metrics import Scores, checked_scores
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.network.sites import Site
from deepenc.plugins import build


class Ensemble(Attack):
    """Let several detectors vote: the mean of the ranks that they give a channel within its site.

    Each detector runs on the same case and on one shared budget. What a detector raises ends the whole.
    """

    name: ClassVar[str] = "ensemble"

    of: tuple[Attack, ...] = Field(
        default_factory=lambda: tuple(build("attack", name) for name in ("norms", "collisions")), min_length=1
    )
    """The detectors."""
    weights: tuple[float, ...] | None = None
    """Weight of each detector's ranks, ``>= 0``; default: all alike."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        weights = self.weights
        if weights is None:
            return self
        if len(weights) != len(self.of):
            raise ValueError(f"expected one weight for each of {len(self.of)} detectors, got {len(weights)}")
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ValueError(f"expected weights >= 0, one of them above, got {list(weights)}")
        return self

    @property
    def needs(self) -> Needs:
        """What all detectors need."""
        return reduce(Needs.union, (attack.needs for attack in self.of))

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        claims = [attack.attack(case) for attack in self.of]
        votes = [ranks(self._scores(*pair, case), case.sites) for pair in zip(self.of, claims, strict=True)]
        return Claim(
            diverged=any(claim.diverged for claim in claims),
            scores={
                site.name: torch.from_numpy(
                    np.average([vote[site.name] for vote in votes], axis=0, weights=self.weights)
                )
                for site in case.sites
            },
        )

    def _scores(self, attack: Attack, claim: Claim, case: Case) -> Scores:
        if claim.scores is None:
            raise ClaimError(f"ensemble: {attack.name!r} claims no scores; only detectors can vote")
        return checked_scores(claim.scores, case.sites, f"ensemble of {attack.name}")


def ranks(scores: Scores, sites: Sequence[Site]) -> Scores:
    """Ranks within the site, between 0 and 1; equal scores, or none, share their mean rank."""
    return {
        site.name: (rankdata(scores.get(site.name, np.zeros(site.width))) - 0.5) / site.width
        for site in sites
    }
