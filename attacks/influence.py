"""How much the layers behind a channel would miss it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepenc.analysis.batchnorm import Moments
from deepenc.analysis.consistency import Evidence, decode
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.network.sites import Site


class Influence(Attack):
    """Suspect the channels without which the statistics of the layers behind would change most.

    Confusion channels that do great harm are heard where they do it, whatever their weights look like. No
    stored statistic is used, so that a release which has only its own (`withhold`) hides nothing. A site
    behind which no BatchNorm comes is not judged. Of harmless confusion channels it says nothing.
    """

    name: ClassVar[str] = "influence"

    images: int = Field(64, ge=2)
    """Unlabelled images to measure on."""

    @property
    def needs(self) -> Needs:
        """The images."""
        return Needs(unlabelled=self.images)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        scores: dict[str, Tensor] = {}

        def listen(site: Site, evidence: Evidence) -> Sequence[int]:
            scores[site.name] = missed(evidence).cpu()
            return ()

        decode(case.copy(), case.sites, case.unlabelled[: self.images].inputs, listen)
        return Claim(scores=scores)


def missed(evidence: Evidence) -> Tensor:
    """How far the rows behind move from what they are when each channel is silenced; ``(width,)``."""
    mean, square = evidence.first.sum(1), evidence.second.sum((1, 2))
    present = Moments(mean + evidence.bias, (square - mean**2).clamp_min(0))
    kept = torch.ones(evidence.width, dtype=torch.bool, device=evidence.own.device)
    return replace(evidence, stored=present, own=torch.zeros_like(evidence.own)).flips(kept)
