"""Stored BatchNorm statistics against measured ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepenc.analysis.batchnorm import Moments, batchnorms, norm_moments, stored
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.threat import Needs
from deepenc.network.sites import Role, Site

LEAST = torch.finfo(torch.float32).tiny


class BatchnormMismatch(Attack):
    """Suspect channels whose running statistics are not those of what they really compute.

    A channel's score is (m - mean)² / var + (sd / √var - 1)², with the mean m and the deviation sd measured
    on unlabelled images, summed over the BatchNorm layers that it passes, on a logarithmic scale. Sites
    without BatchNorm are not scored.
    """

    name: ClassVar[str] = "batchnorm-mismatch"
    detects: ClassVar[Weakness | None] = "statistics"

    images: int = Field(256, ge=2)
    """Unlabelled images to measure on."""
    live: bool = Field(True)
    """Whether earlier layers normalise by the batch, so that their wrong statistics do not spoil these."""

    @property
    def needs(self) -> Needs:
        """The images."""
        return Needs(unlabelled=self.images)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        network = case.copy()
        layers = batchnorms(network)
        measured = norm_moments(network, case.unlabelled[: self.images].inputs, live=self.live)
        far = {path: mismatch(moments, stored(layers[path])) for path, moments in measured.items()}
        scores = {site.name: score for site in case.sites if (score := along(site, far)) is not None}
        return Claim(scores=scores)


def mismatch(measured: Moments, kept: Moments) -> Tensor:
    """How far each channel's statistics are from the stored ones, ``(channels,)``, 0 where they agree."""
    variance = kept.variance.clamp_min(LEAST)  # a channel that never fired has none
    ratio = (measured.variance.clamp_min(0) / variance).sqrt()
    return (measured.mean - kept.mean) ** 2 / variance + (ratio - 1) ** 2


def along(site: Site, far: dict[str, Tensor]) -> Tensor | None:
    """The sum over a site's BatchNorm layers, ``(width,)``; None where it passes none."""
    sums = []
    for slot in site.slots:
        if slot.role is Role.MEAN and slot.module in far:
            sums.append(slot.rows(far[slot.module], site.width).sum(1))
    # The logarithm is of the same order, and stays finite where activations overflow.
    return torch.stack(sums).sum(0).log1p().nan_to_num(nan=0.0, posinf=1e3).cpu() if sums else None
