"""Fine-tuning the encrypted network, the attack of the paper's Table 5."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.arena.training import train
from deepenc.victims.training import Recipe


class Finetune(Attack):
    """Train all weights of the encrypted network on the attacker's labelled images.

    The defaults are the paper's (Table 5): 15 epochs, SGD with momentum, a cosine from 0.1 to 0.0001,
    BatchNorm in training mode. It takes fewer steps where the threat model's budget asks for it.
    Differs from the paper: the task, and so the classifier's head, stays the victim's.
    """

    name: ClassVar[str] = "finetune"

    epochs: int = Field(15, ge=1)
    """Passes over the images; not used where `steps` is given."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps."""
    lr: float = Field(0.1, gt=0)
    """First learning rate."""
    final_lr: float = Field(1e-4, ge=0)
    """Last learning rate, reached along a cosine."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""

    @property
    def needs(self) -> Needs:
        """Two labelled images, fewer of which have no batch statistics."""
        return Needs(labelled=2)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        recipe = Recipe(
            epochs=self.epochs,
            steps=self.steps,
            lr=self.lr,
            final_lr=self.final_lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
        )
        return Claim(network=train(case, case.copy(), recipe))
