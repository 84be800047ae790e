"""Fine-tuning a network that was released without BatchNorm, with BatchNorm."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepenc import trees
from deepenc.analysis.following import Run
from deepenc.analysis.renormalising import renormalised
from deepenc.arena.case import Case, Claim
from deepenc.arena.kit.training import TrainedAttack, affordable, train
from deepenc.tasks.examples import joined


class Renormalise(TrainedAttack):
    """Put a BatchNorm behind every convolution that has none, and train with batch statistics.

    The answer to releases whose BatchNorm is folded into the weights. The scale and shift of every new
    BatchNorm are the deviation and the mean that its inputs have on the attacker's images, so that the
    network computes at first what it did, except where confusion channels make outputs grow from layer to
    layer as no trained network's do. Then everything is trained as `finetune` does, at a small learning rate.
    At the end the new layers are folded back: the claimed network is as the encrypted one is, but for biases
    of convolutions that had none. Where every convolution has its BatchNorm, it is `finetune`.

    It bears the learning rate 0.01, at which `finetune` diverges on a folded network, but is not the stronger
    of the two: on the unprotected folded ResNet-20 (500 labels, 80 steps, 3 keys) it gets 87.4 %, `finetune`
    at 0.001 90.7 %. Confusion weights optimised for damage leave it 16.9 %, less than scratch.
    """

    name: ClassVar[str] = "renormalise"

    steps: int | None = Field(80, ge=1)
    """Optimiser steps."""
    lr: float = Field(0.01, gt=0)
    """First learning rate."""
    images: int = Field(64, ge=2)
    """Images that the deviations are measured on at most, unlabelled ones first; they may cost half of the
    samples that are left."""
    largest: float = Field(5.0, gt=0)
    """Largest deviation of a channel's outputs, in medians of those of the first convolution's channels, in
    front of which there is nothing that could spoil them; larger ones are scaled down to it."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        network = case.copy()
        recipe = self.recipe()
        if affordable(case, recipe, case.labelled).steps == 0:
            return Claim(network=network)
        left = case.meter.left("samples")
        count = self.images if left is None else min(self.images, left // 2 - 1)
        if count > 0:
            inputs = joined([case.unlabelled, case.labelled])[:count].inputs
            paths = Run.of(network, trees.take(inputs, slice(1))).unnormalised()
            with renormalised(network, paths, inputs, self.largest):
                return train(case, network, recipe)
        return Claim(network=network)
