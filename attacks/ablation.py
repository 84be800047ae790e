"""What becomes of the network when a channel is silenced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepenc.analysis.batchnorm import reestimate
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.kit.unlabelled import inconsistency, information
from deepenc.arena.threat import Needs
from deepenc.network.gates import gated_slots
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.tasks.task import Task


class Ablation(Attack):
    """Suspect the channels whose silence does the network good, measured one at a time.

    A channel's score is how far the objective falls when its outgoing weights are zero. Greedy, the worst
    channels of each site go and the rest is measured again: confusion channels hide each other's effect.
    Of many channels that do harm together, single ones show little: it promises nothing in a self-test.
    """

    name: ClassVar[str] = "ablation"

    mode: Literal["single", "greedy"] = "single"
    """Measure once, or again after every removal."""
    objective: Literal["loss", "entropy", "statistics", "size"] = "statistics"
    """What shall fall: the task's loss on labels; the entropy of predictions less that of their mean, so that
    to answer one class with confidence is no good; the distance of BatchNorm's inputs from its stored
    statistics; the logarithm of the outputs' size, which without BatchNorm nothing keeps from growing."""
    images: int = Field(64, ge=2)
    """Images to measure on, labelled ones for the loss."""
    per_round: int = Field(1, ge=1)
    """Channels of each site that go in a round of greedy."""
    recalibrate: bool = Field(False)
    """Whether greedy re-estimates BatchNorm's statistics after each round; not for statistics."""

    @model_validator(mode="after")
    def _keeps_its_reference(self) -> Self:
        if self.recalibrate and (self.objective == "statistics" or self.mode == "single"):
            raise ValueError("`recalibrate` is for `mode: greedy`, and an objective other than 'statistics'")
        return self

    @property
    def needs(self) -> Needs:
        """The images; greedy must know when to stop."""
        loss = self.objective == "loss"
        return Needs(
            allocation=self.mode == "greedy",
            labelled=self.images if loss else 0,
            unlabelled=0 if loss else self.images,
            offers=frozenset({"logits"}) if self.objective == "entropy" else frozenset(),
        )

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        network = case.copy()
        examples = (case.labelled if self.objective == "loss" else case.unlabelled)[: self.images]
        inputs, targets = examples.batch()
        measure = self._objective(case.task, network, inputs, targets)
        if self.mode == "single":
            return Claim(scores={site.name: falls(network, site, measure) for site in case.sites})
        counts = case.counts()
        scores: dict[str, Tensor] = {}
        gone: dict[str, list[int]] = {site.name: [] for site in case.sites}
        open_sites = list(case.sites)
        while open_sites:
            scores |= {site.name: falls(network, site, measure, gone[site.name]) for site in open_sites}
            for site in open_sites:
                missing = counts.get(site.name, 0) - len(gone[site.name])
                order = scores[site.name].argsort(descending=True, stable=True).tolist()
                worst = [channel for channel in order if channel not in gone[site.name]]
                worst = worst[: min(missing, self.per_round)]
                silence(network, site, worst)
                gone[site.name] += worst
            open_sites = [s for s in open_sites if len(gone[s.name]) < counts.get(s.name, 0)]
            if self.recalibrate and open_sites:
                reestimate(network, inputs)
        return Claim(scores={name: ranked(found, gone[name]) for name, found in scores.items()})

    def _objective(self, task: Task, network: nn.Module, inputs: Any, targets: Any) -> Callable[[], float]:
        def value() -> float:
            if self.objective == "statistics":
                return inconsistency(network, inputs)
            with torch.no_grad():
                if self.objective == "loss":
                    return float(task.loss(network, inputs, targets))
                if self.objective == "size":
                    response = task.numbers(task.response(network, inputs))
                    return float(response.double().abs().mean().log())
                return -float(information(task.logits(task.run(network, inputs)).double()))

        return value


def falls(network: nn.Module, site: Site, measure: Callable[[], float], gone: Sequence[int] = ()) -> Tensor:
    """How far the objective falls when each channel is silenced, ``(width,)``; 0 for those that are."""
    before = measure()
    tensors = {slot.tensor: named_tensors(network)[slot.tensor].detach() for slot in gated_slots(site)}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    found = torch.zeros(site.width, dtype=torch.float64)
    for channel in range(site.width):
        if channel not in gone:
            silence(network, site, [channel])
            found[channel] = before - measure()
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
    return found.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def silence(network: nn.Module, site: Site, channels: Sequence[int]) -> None:
    """Zero what carries channels on, in place."""
    tensors = named_tensors(network)
    for slot in gated_slots(site):
        tensor = tensors[slot.tensor].detach()
        tensor.index_fill_(slot.dim, slot.entries(channels).to(tensor.device), 0)


def ranked(scores: Tensor, gone: Sequence[int]) -> Tensor:
    """Scores with those that went above all others, the first on top."""
    scores = scores.clone()
    top = float(scores.max())
    for place, channel in enumerate(reversed(gone), 1):
        scores[channel] = top + place
    return scores
