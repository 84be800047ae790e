"""The key, layer by layer, from the BatchNorm statistics of the layers behind."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepenc.analysis.consistency import Evidence, decode
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.threat import Needs
from deepenc.network.sites import Site


class Peel(Attack):
    """Decode the key site by site: silence what keeps the layers behind from their stored statistics.

    The stored statistics of real channels describe the victim. At each site, in the network's order, the
    channels go one by one whose removal brings the statistics of the rows behind closest to the stored ones;
    then single swaps, as long as they help. Later sites are measured without the channels found so far.
    A site behind which no BatchNorm comes is judged by its channels' own statistics, or not at all.
    """

    name: ClassVar[str] = "peel"
    detects: ClassVar[Weakness | None] = "damage"

    images: int = Field(32, ge=2)
    """Unlabelled images to measure on."""
    swaps: int = Field(50, ge=0)
    """Swaps at each site at most."""
    own: float = Field(1.0, ge=0)
    """Weight of a kept channel's own statistics; with 0 they count only where no BatchNorm comes behind."""

    @property
    def needs(self) -> Needs:
        """How many channels to find, and the images."""
        return Needs(allocation=True, unlabelled=self.images)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        counts = case.counts()
        scores: dict[str, Tensor] = {}

        def solve(site: Site, evidence: Evidence) -> list[int]:
            kept = peeled(evidence, counts.get(site.name, 0))
            kept = swapped(evidence, kept, self.swaps)
            scores[site.name] = suspicion(evidence, kept).cpu()
            return (~kept).nonzero().flatten().tolist()

        decode(case.copy(), case.sites, case.unlabelled[: self.images].inputs, solve, own=self.own)
        return Claim(scores=scores)


def peeled(evidence: Evidence, count: int) -> Tensor:
    """Which channels are kept when the worst goes, ``count`` times; ``(width,)``, bool."""
    kept = torch.ones(evidence.width, dtype=torch.bool, device=evidence.own.device)
    for _ in range(min(count, evidence.width - 1)):
        losses = evidence.flips(kept).where(kept, torch.inf)
        kept[losses.argmin()] = False
    return kept


def swapped(evidence: Evidence, kept: Tensor, most: int) -> Tensor:
    """A guess after the best swaps, taken as long as one helps."""
    kept = kept.clone()
    loss = evidence.loss(kept)
    for _ in range(most):
        losses = evidence.swaps(kept)
        if not losses.numel() or not float(losses.min()) < loss - 1e-12:
            break
        loss = float(losses.min())
        row, column = divmod(int(losses.argmin()), losses.shape[1])
        back, gone = (~kept).nonzero()[row], kept.nonzero()[column]
        kept[back], kept[gone] = True, False
    return kept


def suspicion(evidence: Evidence, kept: Tensor) -> Tensor:
    """Scores ``(width,)``: what a channel's presence costs; those removed above all that are kept."""
    cost = (evidence.flips(kept) - evidence.loss(kept)) * (1 - 2 * kept.double())
    lift = 1 + cost.max() - cost.min()
    return cost + lift * ~kept
