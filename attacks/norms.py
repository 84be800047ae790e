"""Outliers among the norms of the weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.channels import channel_rows
from deepenc.network.sites import Role

# Makes the median absolute deviation of a normal distribution its standard deviation.
NORMAL = 1.4826


class Norms(Attack):
    """Suspect channels whose incoming or outgoing weights have an unusual norm.

    A channel's score is the larger of its two robust z-scores, by absolute value, of the logarithm of the
    Euclidean norm among the channels of its site. Needs no data.
    """

    name: ClassVar[str] = "norms"
    tell: ClassVar[Weakness | None] = "loud"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        state = case.encrypted.state_dict()
        scores = {}
        for site in case.sites:
            sides = [channel_rows(state, site, role) for role in (Role.INCOMING, Role.OUTGOING)]
            scores[site.name] = torch.stack([outlierness(rows) for rows in sides]).amax(0)
        return Claim(scores=scores)


def outlierness(rows: Tensor) -> Tensor:
    """Absolute robust z-score of each row's log norm, ``(channels, features)`` -> ``(channels,)``."""
    norms = torch.linalg.vector_norm(rows.double(), dim=1)
    logs = norms.clamp_min(torch.finfo(torch.float64).tiny).log()
    away = (logs - logs.median()).abs()
    # Where more than half of the norms are equal, any other one is an outlier.
    spread = away.median() if away.median() > 0 else away.mean()
    scores: Tensor = away / (spread * NORMAL).clamp_min(torch.finfo(torch.float64).tiny)
    return scores
