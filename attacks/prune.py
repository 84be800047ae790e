"""Channels that the network hardly uses."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deepenc.arena.case import Attack, Case, Claim
from deepenc.network.sites import Role, Site


class Prune(Attack):
    """Suspect the channels that the network hardly uses: the smallest factors of the normalisation.

    Made for a chain, after fine-tuning with `l1` has driven the factors γ of channels that nobody needs to
    0 (network slimming, Liu et al. 2017); needs no data. A site without such factors is judged by its
    outgoing weights.
    """

    name: ClassVar[str] = "prune"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        state = case.encrypted.state_dict()
        return Claim(scores={site.name: -use(state, site).cpu() for site in case.sites})


def use(state: dict[str, Tensor], site: Site) -> Tensor:
    """How much of each channel goes on, relative to its site, ``(width,)``, float64.

    Several normalisations, or layers, count alike, whatever the size of their weights.
    """
    for role in (Role.SCALE, Role.OUTGOING):
        norms = [torch.linalg.vector_norm(rows.double(), dim=1) for _, rows in site.rows(state, role)]
        if norms:
            return torch.stack([n / n.mean().clamp_min(torch.finfo(n.dtype).tiny) for n in norms]).mean(0)
    return torch.zeros(site.width, dtype=torch.float64)
