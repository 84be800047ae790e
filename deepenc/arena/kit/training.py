"""Training with what a case holds, within what its threat model allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from pydantic import Field
from torch import nn

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.tasks.examples import Examples
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit


def train(
    case: Case,
    network: nn.Module,
    recipe: Recipe,
    *,
    examples: Examples | None = None,
    groups: Mapping[str, float] | None = None,
    l1: Mapping[str, float] | None = None,
) -> Claim:
    """Train a network in place with the case's seed.

    The recipe, its cosine included, is cut to the budget that is left; where nothing is left, the network
    is as it was.

    Args:
        case: With at least one labelled example, or ``examples`` are given.
        network: On the case's device.
        recipe: How.
        examples: What to train on; default: the case's labelled examples.
        groups: Learning-rate factors of parameters, by name (see `fit`).
        l1: Weights of absolute values in the loss, by parameter name (see `fit`).

    Returns:
        A claim of the network, in eval mode, always with finite weights (see `fit`); it says whether the
        training diverged.
    """
    examples = case.labelled if examples is None else examples
    within = affordable(case, recipe, examples)
    finite = fit(network, case.task, examples, within, case.generator(), groups, l1)
    return Claim(network=network, diverged=not finite)


def affordable(case: Case, recipe: Recipe, examples: Examples) -> Recipe:
    """The recipe cut to the budget that is left, for training on these examples."""
    meter = case.meter
    return recipe.within(len(examples), steps=meter.left("steps"), samples=meter.left("samples"))


class TrainedAttack(Attack):
    """An attack that trains on labelled images; its fields are the recipe.

    The defaults are the paper's (Table 5).
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW, for transformers; its `lr` is about 100 times
    smaller."""
    epochs: int = Field(15, ge=1)
    """Passes over the images; not used where `steps` is given."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps."""
    lr: float = Field(0.1, gt=0)
    """First learning rate."""
    final_lr: float = Field(1e-4, ge=0)
    """Last learning rate, reached along a cosine."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD, first β of AdamW."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes."""
    flip: bool = False
    """Whether images are mirrored left to right at random."""
    shift: float = Field(0.0, ge=0, lt=1)
    """Random shifts of the images, as a fraction of their size."""
    crop: float = Field(0.0, ge=0, le=1)
    """Smallest area of random crops, as a fraction of the image's; 0 crops nothing."""
    mixed: bool = False
    """Whether to compute in bfloat16 where that is safe: faster, not quite the same numbers."""

    @property
    def needs(self) -> Needs:
        """Two labelled images, fewer of which have no batch statistics."""
        return Needs(labelled=2)

    def recipe(self, *, eval_norms: bool = False) -> Recipe:
        """The recipe that the fields say.

        Args:
            eval_norms: As in `Recipe`.
        """
        own = TrainedAttack.model_fields
        return Recipe(**{field: getattr(self, field) for field in own}, eval_norms=eval_norms)


@contextmanager
def portion(case: Case, runs: int, *, reserve: int = 0) -> Iterator[Case]:
    """One of several equal parts of the steps and samples that are left, for what runs inside.

    Args:
        case: With the budget to divide.
        runs: Parts, ``>= 1``.
        reserve: Samples to keep back before dividing.

    Yields:
        The case; its meter allows no more than the part inside.
    """
    steps, samples = case.meter.left("steps"), case.meter.left("samples")
    with case.meter.limited(
        steps=None if steps is None else steps // runs,
        samples=None if samples is None else max(0, samples - reserve) // runs,
    ):
        yield case
