"""First-order saliency: what the slope of a loss says of each channel."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deepenc import trees
from deepenc.analysis.batchnorm import batchnorms
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.network.gates import Gated
from deepenc.tasks.task import Task


class Saliency(Attack):
    """Suspect the channels whose silencing promises, to first order, to lower the loss.

    With a gate of 1 on every channel, the derivative of the loss by the gate is what the loss falls by when
    the gate closes (Taylor's expansion, Molchanov et al. 2017, but with its sign). One pass over the images,
    forth and back. Weak where confusion channels do their damage together.
    """

    name: ClassVar[str] = "saliency"

    objective: Literal["loss", "entropy"] = "loss"
    """The task's loss on labelled images, or the mean entropy of the predictions for unlabelled ones."""
    absolute: bool = False
    """Whether to suspect the channels that matter most instead, for better or worse."""
    images: int = Field(500, ge=2)
    """Images to use, at most."""
    batch_size: int = Field(64, ge=2)
    """Images at a time; the rest of the division is spread over the batches."""
    freeze_norms: bool = True
    """Whether BatchNorm uses its stored statistics instead of each batch's."""

    @property
    def needs(self) -> Needs:
        """Two images, fewer of which have no batch statistics; labelled ones for the loss."""
        if self.objective == "loss":
            return Needs(labelled=2)
        return Needs(unlabelled=2, offers=frozenset({"logits"}))

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        gated = Gated(case.copy(), case.sites)
        for layer in batchnorms(gated.network).values():
            layer.train(not self.freeze_norms)
        examples = (case.labelled if self.objective == "loss" else case.unlabelled)[: self.images]
        slopes = [torch.zeros(len(gate), dtype=torch.float64) for gate in gated.gates.values()]
        for chosen in torch.arange(len(examples)).tensor_split(max(1, len(examples) // self.batch_size)):
            with torch.enable_grad():
                loss = self._loss(case.task, gated, *examples.batch(chosen))
                found = torch.autograd.grad(loss, list(gated.gates.values()), materialize_grads=True)
            for slope, more in zip(slopes, found, strict=True):
                # A network that overflows has no slope there.
                slope += torch.nan_to_num(more, 0.0, 0.0, 0.0).double().cpu()
        scores = [slope.abs() if self.absolute else slope for slope in slopes]
        return Claim(scores=dict(zip(gated.gates, scores, strict=True)))

    def _loss(self, task: Task, network: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """Summed over the examples."""
        if self.objective == "loss":
            return task.loss(network, inputs, targets) * trees.size(inputs)
        logs = F.log_softmax(task.logits(task.run(network, inputs)), dim=1)
        return -(logs.exp() * logs).sum()
