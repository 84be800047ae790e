"""What the attacker could do without stealing anything."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.arena.training import train
from deepenc.errors import ClaimError
from deepenc.victims.training import Recipe


class Scratch(Attack):
    """Train a fresh network of the same architecture on the attacker's labelled images.

    The reference that an advantage is measured from, hence a recipe that does well on few images. It takes
    fewer steps where the threat model's budget asks for it; without two labelled images the network stays
    as it was initialised.
    """

    name: ClassVar[str] = "scratch"
    reference: ClassVar[Literal["floor", "scratch"] | None] = "scratch"

    steps: int = Field(400, ge=1)
    """Optimiser steps."""
    lr: float = Field(0.1, gt=0)
    """First learning rate; it falls to 0 along a cosine."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""
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
            recipe = Recipe(
                steps=self.steps,
                lr=self.lr,
                final_lr=0.0,
                weight_decay=self.weight_decay,
                batch_size=self.batch_size,
                shift=self.shift,
            )
            train(case, network, recipe)
        return Claim(network=network)
