"""Whether a victim is what the arena relies on: parts that share nothing, targets, a network that runs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task
from deepenc.victims.data.splits import shared
from deepenc.victims.victim import Victim

log = logging.getLogger(__name__)

CHUNK = 256
"""Examples at a time."""
TRIED = 100
"""Examples that the network is tried on."""


def validated(victim: object) -> Victim:
    """The victim, if every number that is measured on it can mean something.

    A network that is no better than chance is told in the log.

    Args:
        victim: What a `VictimSource` loaded; its network is put into eval mode.

    Raises:
        VictimError: A part is empty, or shares images with another one, or has inputs that are not finite, or
            targets that do not fit the task; or the network does not run, or not as the task expects.
    """
    if not isinstance(victim, Victim):
        raise VictimError(f"expected a Victim from the source's `load`, got {type(victim).__name__}")
    who = f"victim {victim.name!r}"
    if not isinstance(victim.task, Task):
        raise VictimError(f"{who}: expected a Task as `task`, got {type(victim.task).__name__}")
    parts = {"defender": victim.defender, "attacker": victim.attacker, "judge": victim.judge}
    for role, examples in parts.items():
        # The examples of a network that is yet to be trained may be of another task, with its targets.
        _check_examples(f"{who}: the {role}'s", examples, victim.task if _judged(victim, role) else None)
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if count := shared(first, second):
            raise VictimError(
                f"{who}: {count} of the {one}'s examples are the {other}'s, too; share them out so that no "
                "example is in two parts, as `deepenc.victims.data.splits.split` does"
            )
    return _checked_network(who, victim)


def _judged(victim: Victim, role: str) -> bool:
    return victim.trained or role != "defender"


def _check_examples(whose: str, examples: object, task: Task | None) -> None:
    if not isinstance(examples, Examples):
        raise VictimError(f"{whose} part: expected Examples, got {type(examples).__name__}")
    if not len(examples):
        raise VictimError(f"{whose} part: expected at least one example, got none")
    # What is read when it is needed is tried on a sample: to read all of it may take hours.
    some = examples if examples.stored else examples[_chosen(len(examples))]
    for at, (inputs, targets) in enumerate(some.batches(CHUNK)):
        if task is not None and (wrong := task.misfit(targets)):
            raise VictimError(f"{whose} targets: {wrong}")
        for place, one in enumerate(trees.examples_of(inputs)):
            if not all(bool(t.isfinite().all()) for t in trees.tensors(one)):
                raise VictimError(
                    f"{whose} inputs: example {at * CHUNK + place} has values that are not finite; repair or "
                    "remove it"
                )


def _chosen(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:TRIED]


def _checked_network(who: str, victim: Victim) -> Victim:
    for name in ("model", "public", "plain"):
        network = getattr(victim, name)
        if not isinstance(network, nn.Module) and (name == "model" or network is not None):
            raise VictimError(f"{who}: expected a torch.nn.Module as `{name}`, got {type(network).__name__}")
    victim.model.eval()
    task = victim.task.fitted(_outputs(who, "defender", victim, victim.task, victim.defender[:1]))
    if task is not victim.task:
        victim = dataclasses.replace(victim, task=task)
    _outputs(who, "attacker", victim, task, victim.attacker[:1])
    some = victim.judge[_chosen(len(victim.judge))]
    outputs = _outputs(who, "judge", victim, task, some)
    targets = some.targets
    if wrong := task.misfit(targets):
        raise VictimError(f"{who}: the judge's targets: {wrong}")
    if victim.trained and "labels" in task.offers:
        right = task.worth(task.outcomes(outputs, targets)).value
        _warn_of_chance(who, round(right * len(some)), task.labels(targets))
    return victim


def _outputs(who: str, role: str, victim: Victim, task: Task, some: Examples) -> Any:
    inputs = some.batch(range(len(some))).inputs
    try:
        with torch.no_grad():
            outputs = task.run(victim.model, inputs)
    except Exception as error:  # somebody's own network
        raise VictimError(
            f"{who}: the network does not run on the {role}'s examples: {type(error).__name__}: "
            f"{first_line(error)}; give inputs that it takes"
        ) from error
    if wrong := task.complaint(outputs, inputs):
        raise VictimError(f"{who}: {wrong}; give the task {task.name!r} a network with such outputs")
    if any(task.unreadable(outputs)) or not all(
        bool(t.isfinite().all()) for t in trees.tensors(outputs) if t.is_floating_point()
    ):
        raise VictimError(
            f"{who}: the network's outputs on the {role}'s examples are not finite; see whether its "
            "weights are"
        )
    return outputs


def _warn_of_chance(who: str, correct: int, labels: Tensor) -> None:
    """Say so where naming always the same class would do as well, within two deviations."""
    count = len(labels)
    share = int(labels.bincount().max()) / count
    chance = count * share + 2 * math.sqrt(count * share * (1 - share))
    if correct <= chance < count:
        log.warning(
            "%s: the network is right about %d of %d of the judge's images, no better than chance; are the "
            "images, their normalisation and the order of the classes those that it was trained with?",
            who,
            correct,
            count,
        )
