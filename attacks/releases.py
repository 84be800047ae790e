"""Several releases of one model under different keys: what they share is real."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from deepenc.analysis.matching import match
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.network.structure import named_tensors


class Releases(Attack):
    """Match the channels to those of other releases of the model; suspect what another release lacks.

    Channels are matched one to one by the directions of their incoming and outgoing weights (Hungarian
    method): real ones are equal bit for bit, or nearly so where the owner fine-tuned in between, and
    confusion channels, drawn again under each key, are like nothing. With several releases their verdicts
    are averaged. Needs no data.
    """

    name: ClassVar[str] = "releases"

    releases: int | None = Field(None, ge=1)
    """How many of the other releases to use; default: all."""
    rounds: int = Field(3, ge=1)
    """Passes over the network; from the second on, weights to later sites are compared too."""

    @property
    def needs(self) -> Needs:
        """A further release at least."""
        return Needs(releases=self.releases or 1)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        if not case.releases:
            raise ClaimError("releases needs another release: `releases: 1` or more in the threat model")
        tensors = named_tensors(case.encrypted)
        verdicts: dict[str, list[torch.Tensor]] = {}
        for release in case.releases[: self.releases]:
            others = named_tensors(release.encrypted)
            found = match(tensors, case.sites, others, release.sites, rounds=self.rounds)
            for name, matched in found.items():
                verdicts.setdefault(name, []).append(matched.strangeness())
        return Claim(scores={name: torch.stack(each).mean(0) for name, each in verdicts.items()})
