"""A relaxed key, fitted to what the authorised model answers."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Adam

from deepenc import trees
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.kit.asking import asked, far_from, takes_noise
from deepenc.arena.kit.descent import Descent, descend
from deepenc.arena.threat import Needs
from deepenc.network.gates import Gated

HALVINGS = 40  # of an interval of logits, in search of the shift
SMALL = 1e-12
DAMPING = 0.05
"""Slope below which Adam's steps shrink: a few ruinous channels are masked first, while the rest waits."""


class OracleGates(Attack):
    """Fit a mask of all channels to the outputs of the authorised model; suspect what it masks.

    Minimises ``log(|f(x; m) - y|² / |y|²) + penalty · mean m(1 - m)`` over the logits of the mask m, with
    BatchNorm's stored statistics, which are right once the confusion channels are gone. Outputs that are not
    as many values for each input (a detector's boxes) are learned from instead: then the task's loss on them
    stands in the logarithm. Where ΔC is known, the masks of each site add up to the real channels. Every
    input is asked once; no label is used.
    """

    name: ClassVar[str] = "oracle-gates"
    detects: ClassVar[Weakness | None] = "damage"

    images: int = Field(200, ge=1)
    """Inputs to ask: unlabelled images first, then labelled ones; noise where there are not enough."""
    steps: int = Field(300, ge=1)
    """Steps of Adam."""
    lr: float = Field(0.2, gt=0)
    """Learning rate."""
    batch_size: int = Field(32, ge=1)
    """Inputs per step."""
    penalty: float = Field(0.1, ge=0)
    """Weight of m(1 - m), reached linearly over the steps: in the end the mask has to take sides."""
    start: float = Field(0.9, gt=0, lt=1)
    """Of the mask where ΔC is unknown; else it starts at the share of real channels."""

    @property
    def needs(self) -> Needs:
        """The answers."""
        return Needs(oracle=self.images, offers=frozenset({"answers"}))

    def pointless(self, case: Case) -> str | None:
        """Nothing can be asked: no images are held, and noise is no input."""
        if len(case.unlabelled) + len(case.labelled) or takes_noise(case):
            return None
        return "the attacker holds no inputs to ask about, and noise is none: inputs are no tensor of floats"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        gated = Gated(case.copy(), case.sites)
        real = real_channels(case)
        level = math.log(self.start / (1 - self.start))
        logits = {n: torch.full_like(g.detach(), level) for n, g in gated.gates.items() if n in real}
        taken, diverged = self._fit(case, gated, logits, real)
        masks = {name: mask(logit.double(), real[name]) for name, logit in logits.items()}
        scores = {site.name: torch.zeros(site.width, dtype=torch.float64) for site in case.sites}
        scores |= {name: (1 - m).cpu() for name, m in masks.items()}
        if not taken:
            return Claim(scores=scores, network=case.copy(), diverged=diverged)
        if case.allocation is not None:
            return Claim(scores=scores, diverged=diverged)
        gated.gates = masks
        return Claim(scores=scores, network=gated.baked(), diverged=diverged)

    def _fit(
        self, case: Case, gated: Gated, logits: dict[str, Tensor], real: dict[str, int | None]
    ) -> Descent:
        """Change the logits in place; gives the steps taken."""
        left, size = case.meter.left("samples"), min(self.batch_size, self.images)
        steps = self.steps if left is None else min(self.steps, left // size)
        if not logits or not steps or 0 in (case.meter.left("steps"), case.meter.left("queries")):
            return Descent(0, diverged=False)  # and nothing is asked in vain
        generator = case.generator()
        inputs, answers = asked(case, self.images, generator)
        missed = far_from(case.task, answers)
        done = 0

        def loss() -> Tensor:
            nonlocal done
            done += 1
            chosen = torch.randperm(trees.size(inputs), generator=generator)[:size].to(case.device)
            gated.gates = {name: mask(logit, real[name]) for name, logit in logits.items()}
            distance = missed(gated, trees.take(inputs, chosen), chosen)
            every = torch.cat(list(gated.gates.values()))
            hesitant = (every * (1 - every)).mean()
            return distance.clamp_min(SMALL).log() + self.penalty * done / steps * hesitant

        return descend(
            case, logits.values(), loss, steps=steps, lr=self.lr, optimizer=partial(Adam, eps=DAMPING)
        )


def real_channels(case: Case) -> dict[str, int | None]:
    """How many channels of each site are real, None where that is withheld; sites without others left out."""
    if case.allocation is None:
        return {site.name: None for site in case.sites}
    return {site.name: site.width - n for site in case.sites if (n := case.allocation.get(site.name))}


def mask(logit: Tensor, real: int | None) -> Tensor:
    """The mask of some logits, ``(width,)``, shifted so that it adds up to the real channels.

    Args:
        logit: ``(width,)``.
        real: Their number, in (0, width); None shifts nothing.
    """
    if real is None:
        return logit.sigmoid()
    with torch.no_grad():
        level = math.log(real / (len(logit) - real))  # were all logits equal, they would be this
        low, high = level - logit.max(), level - logit.min()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = (logit + middle).sigmoid().sum() > real
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (logit + high).sigmoid()
