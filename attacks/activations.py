"""How channels behave on data: how often they are silent, how alike, how selective."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from deepenc.analysis.activations import observe
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.network.sites import Site

POSITIONS = 2**16
"""Values of a channel that are correlated with those of others; more are thinned out."""
LEAST = torch.finfo(torch.float64).tiny


class Activations(Attack):
    """Suspect channels that are silent, dense, unlike all others, or the same for every class.

    Looks at a channel's values as the next layer sees them. Training makes channels that take part: they
    fire on some inputs, overlap with others, and tell classes apart. Drawn ones need not.
    """

    name: ClassVar[str] = "activations"

    statistic: Literal["dead", "sparsity", "redundancy", "selectivity"] = "redundancy"
    """The share of images on which a channel never fires; the share of values at which it does; how little
    it correlates with the most similar other channel; how little of its variance lies between classes."""
    images: int = Field(64, ge=2)
    """Images to look at, labelled ones for selectivity."""

    @property
    def needs(self) -> Needs:
        """The images."""
        labelled = self.statistic == "selectivity"
        if labelled:
            return Needs(labelled=self.images, offers=frozenset({"labels"}))
        return Needs(unlabelled=self.images)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        scores: dict[str, Tensor] = {}
        examples = case.labelled if self.statistic == "selectivity" else case.unlabelled
        inputs, targets = examples[: self.images].batch()

        def see(site: Site, values: Tensor) -> None:
            match self.statistic:
                case "dead":
                    found = dead(values)
                case "sparsity":
                    found = 1 - sparsity(values)
                case "redundancy":
                    found = 1 - redundancy(values)
                case "selectivity":
                    found = 1 - selectivity(values, case.task.labels(targets))
            scores[site.name] = found.nan_to_num(nan=0.0).cpu()

        observe(case.copy(), case.sites, inputs, see)
        return Claim(scores=scores)


def dead(values: Tensor) -> Tensor:
    """Share of images on which a channel is nowhere above 0.

    Args:
        values: ``(images, width, positions)``.

    Returns:
        ``(width,)``.
    """
    return (values.amax(2) <= 0).double().mean(0)


def sparsity(values: Tensor) -> Tensor:
    """Share of a channel's values that are not above 0, ``(width,)``."""
    return (values <= 0).double().mean((0, 2))


def redundancy(values: Tensor) -> Tensor:
    """Largest absolute correlation with another channel, ``(width,)``; 0 for a constant one."""
    rows = values.transpose(0, 1).flatten(1)
    rows = rows[:, :: -(-rows.shape[1] // POSITIONS)].double()
    rows = rows - rows.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rows = rows / lengths.clamp_min(LEAST)
    largest: Tensor = (rows @ rows.T).abs().fill_diagonal_(0).amax(1)
    return largest


def selectivity(values: Tensor, labels: Tensor) -> Tensor:
    """Share of the variance of a channel's means over an image that lies between classes.

    Args:
        values: ``(images, width, positions)``.
        labels: ``(images,)``.

    Returns:
        ``(width,)``, in [0, 1]; 0 for a constant channel.
    """
    means = values.double().mean(2)
    away = means - means.mean(0)
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    sums = away.new_zeros(len(counts), away.shape[1]).index_add_(0, index, away)
    between: Tensor = (sums**2 / counts[:, None]).sum(0) / (away**2).sum(0).clamp_min(LEAST)
    return between
