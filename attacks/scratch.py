"""What the attacker could do without stealing anything."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deepenc.arena.case import Case, Claim
from deepenc.arena.kit.training import TrainedAttack, train
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError


class Scratch(TrainedAttack):
    """Train a fresh network of the same architecture on the attacker's labelled images.

    The reference that an advantage is measured from, hence a recipe that does well on few images. It takes
    fewer steps where the threat model's budget asks for it; without two labelled images the network stays
    as it was initialised.
    """

    name: ClassVar[str] = "scratch"
    reference: ClassVar[Literal["floor", "scratch"] | None] = "scratch"

    steps: int | None = Field(400, ge=1)
    """Optimiser steps."""
    final_lr: float = Field(0.0, ge=0)
    """Last learning rate, reached along a cosine."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay."""
    shift: float = Field(0.125, ge=0, lt=1)
    """Random shifts of the images, as a fraction of their size."""

    @property
    def needs(self) -> Needs:
        """The architecture."""
        return Needs(architecture=True)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        if case.blank is None:
            raise ClaimError(
                "scratch needs the architecture; give it `architecture: true` in the threat model"
            )
        network = case.blank(case.seed).to(case.device).eval()
        if len(case.labelled) >= 2:
            return train(case, network, self.recipe())
        return Claim(network=network)
