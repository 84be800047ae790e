"""A gate for every channel, learned on the attacker's images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Adam

from deepenc.analysis.batchnorm import batchnorms, reestimate
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.kit.descent import Descent, descend
from deepenc.arena.kit.unlabelled import information, mismatches
from deepenc.arena.threat import Needs
from deepenc.network.gates import Gated
from deepenc.tasks.examples import joined

# Hard-concrete gates, Louizos et al. 2018: temperature, and the interval that is cut to [0, 1].
TEMPERATURE, LOWEST, HIGHEST = 2 / 3, -0.1, 1.1
SMALL = 1e-6


class Gates(Attack):
    """Learn one gate per channel on a few images; suspect the channels whose gates close.

    A gate multiplies what its channel passes on; all weights stay. The gated network is the repaired one,
    and the gates are scores. The logarithm of the objective is minimised, by steps of Adam that shrink with
    a slope below `damping`: a few ruinous channels are then shut first, one after the other, and gates that
    hardly matter stay where they are instead of memorising the images.
    """

    name: ClassVar[str] = "gates"
    detects: ClassVar[Weakness | None] = "damage"

    objective: Literal["loss", "entropy", "statistics"] = "loss"
    """The task's loss on labelled images; or, unlabelled, the mean entropy of the predictions less the
    entropy of their mean (InfoMax), or how far batches' statistics are from those that BatchNorm stores."""
    form: Literal["linear", "sigmoid", "hard-concrete"] = "linear"
    """What is learned: the gate; a number that a sigmoid makes a gate; or one that gives the odds of a gate
    that is drawn again in every step, and is often 0 or 1."""
    start: float = Field(1.0, gt=0)
    """Of all gates; but for linear ones at most 0.95, where they can still move."""
    sparsity: float = Field(0.0, ge=0)
    """Weight of the gates' absolute values, summed; of the odds to be open, for hard-concrete ones."""
    tie: float = Field(0.1, ge=0)
    """Weight of the gates' distances from 1, summed: most channels are real."""
    steps: int = Field(60, ge=1)
    """Steps of Adam."""
    lr: float = Field(0.1, gt=0)
    """Learning rate."""
    damping: float = Field(0.3, gt=0)
    """Slope below which steps shrink."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""
    freeze_norms: bool = True
    """Whether BatchNorm uses its stored statistics; else those of each batch, and in the end all are
    re-estimated."""
    keep: Literal["soft", "hard"] = "soft"
    """Claim the gated network; or the scores alone, for the arena to remove the ΔC most suspect channels of
    each site, and where ΔC is withheld the network without the channels whose gates are below `threshold`."""
    threshold: float = Field(0.5, gt=0)
    """As a fraction of the median gate of the site."""

    @property
    def needs(self) -> Needs:
        """Two images, fewer of which have no batch statistics; labelled ones for the loss."""
        if self.objective == "loss":
            return Needs(labelled=2)
        return Needs(unlabelled=2, offers=frozenset({"logits"} if self.objective == "entropy" else ()))

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        every = joined([case.labelled, case.unlabelled])
        renewed = self.keep == "soft" and not self.freeze_norms and bool(batchnorms(case.encrypted))
        gated = Gated(case.copy(), case.sites)
        taken, diverged = self._learn(case, gated, len(every) if renewed else 0)
        scores = {name: -gate.detach().double().cpu() for name, gate in gated.gates.items()}
        if not taken:
            return Claim(scores=scores, network=case.copy(), diverged=diverged)
        if self.keep == "hard" and case.allocation is not None:
            return Claim(scores=scores, diverged=diverged)  # the arena removes as many as there are
        network = case.remove(gated.closed(self.threshold)) if self.keep == "hard" else gated.baked()
        if renewed:
            reestimate(network, every.inputs)
        return Claim(scores=scores, network=network, diverged=diverged)

    def _learn(self, case: Case, gated: Gated, reserve: int) -> Descent:
        """Set the gates; ``reserve`` samples are left over. Gives the steps taken."""
        examples = case.labelled if self.objective == "loss" else case.unlabelled
        generator, size = case.generator(), min(self.batch_size, len(examples))
        left = case.meter.left("samples")
        steps = self.steps if left is None else min(self.steps, max(0, left - reserve) // size)
        learned = {name: torch.full_like(gate, self._first()).detach() for name, gate in gated.gates.items()}
        before = batchnorms(case.encrypted)
        if self.objective == "statistics" and not before:
            steps = 0  # nothing to agree with

        def loss() -> Tensor:
            inputs, targets = examples.batch(torch.randperm(len(examples), generator=generator)[:size])
            gated.gates = {name: self._opened(number, generator) for name, number in learned.items()}
            match self.objective:
                case "loss":
                    value = case.task.loss(gated, inputs, targets)
                case "entropy":
                    logits = case.task.logits(case.task.run(gated, inputs))
                    value = math.log(logits.shape[1]) - information(logits)
                case "statistics":
                    with mismatches(gated.network, before) as missed:
                        case.task.run(gated, inputs)
                    value = torch.stack(missed).mean()
            return value.clamp_min(SMALL).log() + self._penalty(gated.gates, learned)

        for layer in batchnorms(gated.network).values():
            layer.train(not self.freeze_norms)
        taken = descend(
            case, learned.values(), loss, steps=steps, lr=self.lr, optimizer=partial(Adam, eps=self.damping)
        )
        gated.network.eval()
        gated.gates = {name: self._opened(number, None) for name, number in learned.items()}
        return taken

    def _first(self) -> float:
        """What is learned of each gate, at first."""
        if self.form == "linear":
            return self.start
        share = min(self.start, 0.95)
        if self.form == "hard-concrete":
            share = (share - LOWEST) / (HIGHEST - LOWEST)
        return math.log(share / (1 - share))

    def _opened(self, learned: Tensor, generator: torch.Generator | None) -> Tensor:
        """Gates, ``(width,)``; hard-concrete ones are drawn, or without a generator the typical ones."""
        if self.form == "linear":
            return learned.clone()
        if self.form == "sigmoid":
            return learned.sigmoid()
        if generator is not None:
            drawn = torch.rand(learned.shape, generator=generator).clamp(SMALL, 1 - SMALL).to(learned)
            learned = (drawn.logit() + learned) / TEMPERATURE
        return (learned.sigmoid() * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)

    def _penalty(self, gates: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> Tensor:
        every = torch.cat(list(gates.values()))
        size = every.abs()
        if self.form == "hard-concrete":
            size = (torch.cat(list(learned.values())) - TEMPERATURE * math.log(-LOWEST / HIGHEST)).sigmoid()
        return self.sparsity * size.sum() + self.tie * (1 - every).abs().sum()
