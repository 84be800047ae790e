"""Training with what a case holds, within what its threat model allows."""

from __future__ import annotations

from torch import nn

from deepenc.arena.case import Case
from deepenc.victims.training import Recipe, fit


def train(case: Case, network: nn.Module, recipe: Recipe) -> nn.Module:
    """Train a network in place on the case's labelled images, with the case's seed.

    The recipe, its cosine included, is cut to the budget that is left; where nothing is left, the network
    is as it was.

    Args:
        case: With at least one labelled image.
        network: On the case's device.
        recipe: How.

    Returns:
        The network, in eval mode, always with finite weights (see `fit`).
    """
    meter, threat = case.meter, case.threat
    affordable = recipe.within(
        len(case.labelled),
        steps=None if threat.steps is None else threat.steps - meter.steps,
        samples=None if threat.samples is None else threat.samples - meter.samples,
    )
    fit(network, case.labelled, affordable, case.generator())
    return network
