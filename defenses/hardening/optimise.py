"""Hardening: confusion weights optimised for damage that lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle, islice
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Adam

from deepenc import trees
from deepenc.analysis.batchnorm import batch_moments, batch_statistics
from deepenc.encryption.defense import Hardening, Original
from deepenc.encryption.filling.adversaries import Gates, learned_gates, missing
from deepenc.encryption.filling.calibration import Path, calibrate
from deepenc.encryption.filling.damage import Objective, damage, responses
from deepenc.encryption.filling.entries import Confusion, limits
from deepenc.encryption.filling.inputs import batches, draw
from deepenc.encryption.filling.stealth import Disguise, penalty
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout
from deepenc.tasks.task import Task

Detector = Callable[[Mapping[str, Tensor]], Tensor]


class Optimise(Hardening):
    """Optimise the confusion weights for damage that re-estimating BatchNorm statistics does not undo.

    Adam ascends, on the confusion entries alone, a measure of damage on the defender's images, while
    BatchNorm normalises by the batch: what an attacker sees who re-estimates the statistics. After each step
    confusion channels are capped to the norms of the real ones. In the end their own running statistics are
    measured, so that these agree with data. A network without BatchNorm is optimised as it is.

    It answers attacks without labels that change nothing but statistics. Learned gates and fine-tuning with
    some hundred labels still undo it.
    """

    name: ClassVar[str] = "optimise"

    steps: int = Field(60, ge=1)
    """Steps of Adam."""
    lr: float = Field(0.05, gt=0)
    """Learning rate, in units of the root mean square of the victim's entries of each tensor."""
    objective: Objective = "response"
    """What to raise: the relative squared response change, or the cross-entropy with the victim's own
    predictions; the second makes outputs that are wrong more often than by chance."""
    images: int = Field(1024, ge=2)
    """The defender's images to use, at most."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""
    quantile: float = Field(1.0, ge=0.5, le=1)
    """Cap: in no slot does a confusion channel have a larger norm than this quantile of the real channels,
    nor a normalisation's factor or a bias outside their range."""
    disguise: bool = False
    """Whether each confusion channel takes on a look drawn from the joint distribution of the real ones': its
    norms and its entries in vectors, and its other statistics as far as ``stealth`` weighs them. Else
    channels grow as far as the cap lets them, and crowd there."""
    stealth: float = Field(0.0, ge=0)
    """Weight of a detector's penalty (norms, roughness and the like; see `filling.stealth`)."""
    gates: bool = False
    """Whether to ascend, in turn, the damage that is left after an attacker learned gates for a few steps."""
    removal: float = Field(0.0, ge=0, lt=1)
    """Whether to ascend, in turn, the damage that is left without some channels, other ones each time: this
    share of a site's confusion channels, and as many real ones."""
    path: Path = "clean"
    """Where the confusion channels' own statistics are measured (see `calibrate`)."""
    calibration: int = Field(256, ge=2)
    """Images to measure them on, at most, run at once."""

    @property
    def wants_data(self) -> bool:
        """Yes."""
        return True

    def harden(
        self, network: nn.Module, layout: Layout, original: Original, rng: np.random.Generator
    ) -> None:
        """See `Hardening.harden`.

        Raises:
            ConfigError: There are no examples, or what the victim makes of them cannot be compared.
        """
        inputs = draw(f"hardening {self.name!r}", network, original, rng, max(self.images, self.calibration))
        used = trees.take(inputs, slice(self.images))
        target = responses(original, used, self.batch_size)
        confusion = Confusion(network, layout, run=original.task.response)
        if confusion.values:
            with batch_statistics(network):
                self._ascend(confusion, original, used, target, rng)
        confusion.store()
        calibrate(network, layout, trees.take(inputs, slice(self.calibration)), self.path)

    def _ascend(
        self,
        confusion: Confusion,
        original: Original,
        inputs: Any,
        target: Any,
        rng: np.random.Generator,
    ) -> None:
        victim, layout = named_tensors(original.model), confusion.layout
        order = batches(trees.size(inputs), self.batch_size, rng)
        if self.disguise:
            with batch_moments(confusion.network) as seen, torch.no_grad():
                confusion(trees.take(inputs, next(order)))
            disguise = Disguise(whole := confusion.tensors() | seen, layout, rng)
            allowed, detector = disguise.target_norms(whole), disguise.penalty
        else:
            allowed, detector = limits(victim, layout.sites, self.quantile), partial(penalty, layout=layout)
        values = list(confusion.values.values())
        rates = [self.lr * _scale(victim[name]) for name in confusion.values]
        adam = Adam([{"params": [v], "lr": rate} for v, rate in zip(values, rates, strict=True)])
        adversaries = [learned_gates(confusion, original.task, inputs, target, order)] if self.gates else []
        if self.removal:
            adversaries.append(missing(confusion, self.removal, rng))
        for adversary in islice(cycle([None, *adversaries]), self.steps):
            index = next(order)
            gates = next(adversary) if adversary else None
            with torch.enable_grad():
                part, wanted = trees.take(inputs, index), trees.take(target, index)
                loss = self._loss(confusion, original.task, part, wanted, gates, detector)
                gradients = torch.autograd.grad(loss, values, allow_unused=True)
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = None if gradient is None else torch.nan_to_num(gradient, 0, 0, 0)
            adam.step()
            confusion.cap(allowed)

    def _loss(
        self,
        confusion: Confusion,
        task: Task,
        inputs: Any,
        target: Any,
        gates: Gates | None,
        detector: Detector,
    ) -> Tensor:
        watch: AbstractContextManager[dict[str, Tensor]]
        watch = batch_moments(confusion.network) if self.stealth else nullcontext({})
        with watch as seen:
            done = damage(self.objective, task, confusion(inputs, gates=gates), target)
        return self.stealth * detector(confusion.tensors() | seen) - done if self.stealth else -done


def _scale(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
