"""Whether a victim is what the arena relies on: parts that share nothing, targets, a network that runs."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.examples import Batch, Examples
from deepenc.tasks.task import Task
from deepenc.victims.data.splits import shared
from deepenc.victims.victim import Victim

log = logging.getLogger(__name__)

CHUNK = 256
"""Examples at a time."""
TRIED = 100
"""Examples that the network is tried on."""
ENOUGH = 20
"""Examples of which not all can have the same target by accident."""


def validated(victim: object) -> Victim:
    """The victim, if every number that is measured on it can mean something.

    A network that is no better than chance is told in the log.

    Args:
        victim: What a `VictimSource` loaded; its network is put into eval mode.

    Raises:
        VictimError: A part is empty, or shares images with another one, or has inputs that are not finite, or
            targets that do not fit the task; or the same answer is right for all of the judge's examples; or
            the network does not run, or not as the task expects.
    """
    if not isinstance(victim, Victim):
        raise VictimError(f"expected a Victim from the source's `load`, got {type(victim).__name__}")
    who = f"victim {victim.name!r}"
    if not isinstance(victim.task, Task):
        raise VictimError(f"{who}: expected a Task as `task`, got {type(victim.task).__name__}")
    parts = {"defender": victim.defender, "attacker": victim.attacker, "judge": victim.judge}
    for role, examples in parts.items():
        _check_inputs(f"{who}: the {role}'s", examples)
    victim = _running(who, victim)
    for role, examples in parts.items():
        # The examples of a network that is yet to be trained may be of another task, with its targets.
        if victim.trained or role != "defender":
            _check_targets(f"{who}: the {role}'s", examples, victim.task)
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if count := shared(first, second):
            raise VictimError(
                f"{who}: {count} of the {one}'s examples are the {other}'s, too; share them out so that no "
                "example is in two parts, as `deepenc.victims.data.splits.split` does"
            )
    _check_answers(who, victim)
    return victim


def _check_inputs(whose: str, examples: object) -> None:
    if not isinstance(examples, Examples):
        raise VictimError(f"{whose} part: expected Examples, got {type(examples).__name__}")
    if not len(examples):
        raise VictimError(f"{whose} part: expected at least one example, got none; add some")
    for at, (inputs, _) in _tried(examples):
        for place, one in enumerate(trees.examples_of(inputs)):
            if not all(bool(t.isfinite().all()) for t in trees.tensors(one)):
                raise VictimError(
                    f"{whose} inputs: example {at + place} has values that are not finite; repair or remove "
                    "it"
                )


def _check_targets(whose: str, examples: Examples, task: Task) -> None:
    for at, (_, targets) in _tried(examples):
        if wrong := task.misfit(targets):
            each = (trees.take(targets, slice(i, i + 1)) for i in range(trees.size(targets)))
            place = next((i for i, target in enumerate(each) if task.misfit(target)), 0)
            raise VictimError(f"{whose} targets: {wrong}; mend or remove them, first of example {at + place}")


def _tried(examples: Examples) -> Iterator[tuple[int, Batch]]:
    """Batches of the examples that are looked at, each with the number of its first."""
    # What is read when it is needed is tried on a sample: to read all of it may take hours.
    some = examples if examples.stored else examples[_chosen(len(examples))]
    return ((at * CHUNK, batch) for at, batch in enumerate(some.batches(CHUNK)))


def _chosen(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:TRIED]


def _running(who: str, victim: Victim) -> Victim:
    """The victim, once its network runs, with what its task was not told."""
    for name in ("model", "public", "plain"):
        network = getattr(victim, name)
        if not isinstance(network, nn.Module) and (name == "model" or network is not None):
            raise VictimError(f"{who}: expected a torch.nn.Module as `{name}`, got {type(network).__name__}")
    victim.model.eval()
    task = victim.task.fitted(_outputs(who, "defender", victim, victim.task, victim.defender[:1]))
    _outputs(who, "attacker", victim, task, victim.attacker[:1])
    return victim if task is victim.task else dataclasses.replace(victim, task=task)


def _check_answers(who: str, victim: Victim) -> None:
    """Whether the judge's examples tell a good network from a bad one."""
    task, judge = victim.task, victim.judge
    some = judge[_chosen(len(judge))]
    outputs, targets = _outputs(who, "judge", victim, task, some), some.targets
    whole = judge.targets if judge.stored else targets
    if trees.size(whole) >= ENOUGH and (same := task.uninformative(whole)):
        raise VictimError(
            f"{who}: all of {trees.size(whole)} of the judge's examples {same}, so that every answer is "
            "right or wrong alike; give data of all kinds, and see whether they are shuffled"
        )
    if victim.trained and "labels" in task.offers:
        right = task.worth(task.outcomes(outputs, targets)).value
        _warn_of_chance(who, round(right * len(some)), task.labels(targets))


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
