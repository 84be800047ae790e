"""Whether a victim is what the arena relies on: parts that share nothing, labels, a network that runs."""

from __future__ import annotations

import itertools
import logging
import math

import torch
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.victims.data.splits import shared
from deepenc.victims.victim import Images, Victim

log = logging.getLogger(__name__)

CHUNK = 256
"""Images at a time."""
TRIED = 100
"""The judge's images that the network is tried on."""


def validated(victim: object) -> Victim:
    """The victim, if every number that is measured on it can mean something.

    A network that is no better than chance is told in the log.

    Args:
        victim: What a `VictimSource` loaded; its network is put into eval mode.

    Raises:
        VictimError: A part is empty, or shares images with another one, or has inputs that are not finite or
            labels that are no classes; or the network does not run, or not as a classifier.
    """
    if not isinstance(victim, Victim):
        raise VictimError(f"expected a Victim from the source's `load`, got {type(victim).__name__}")
    who = f"victim {victim.name!r}"
    if isinstance(victim.classes, bool) or not isinstance(victim.classes, int) or victim.classes < 2:
        raise VictimError(f"{who}: expected a number of classes, 2 or more, got {victim.classes!r}")
    parts = {"defender": victim.defender, "attacker": victim.attacker, "judge": victim.judge}
    for role, images in parts.items():
        # The images of a network that is yet to be trained may be of another task, with its labels.
        classes = victim.classes if victim.trained or role != "defender" else None
        _check_images(f"{who}: the {role}'s", images, classes)
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if count := shared(first.inputs, second.inputs):
            raise VictimError(
                f"{who}: {count} of the {one}'s images are the {other}'s, too; share them out so that no "
                "image is in two parts, as `deepenc.victims.data.splits.split` does"
            )
    _check_network(who, victim)
    return victim


def _check_images(whose: str, images: object, classes: int | None) -> None:
    if not isinstance(images, Images):
        raise VictimError(f"{whose} part: expected Images, got {type(images).__name__}")
    inputs, labels = images.inputs, images.labels
    if not isinstance(inputs, Tensor) or not inputs.ndim or not len(inputs):
        raise VictimError(
            f"{whose} inputs: expected a tensor (images, ...) of at least one image, got {_described(inputs)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise VictimError(
            f"{whose} labels: expected one an image, int64 ({len(inputs)},), got {_described(labels)}"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (classes is not None and most >= classes):
        upper = "" if classes is None else f" and below {classes}, the number of classes"
        raise VictimError(f"{whose} labels: expected classes from 0{upper}, got {least} to {most}")
    for start in range(0, len(inputs), CHUNK):
        finite = inputs[start : start + CHUNK].isfinite().flatten(1).all(1)
        if not finite.all():
            bad = start + int(finite.long().argmin())
            raise VictimError(
                f"{whose} inputs: image {bad} has values that are not finite; repair or remove it"
            )


def _check_network(who: str, victim: Victim) -> None:
    for name in ("model", "public", "plain"):
        network = getattr(victim, name)
        if not isinstance(network, nn.Module) and (name == "model" or network is not None):
            raise VictimError(f"{who}: expected a torch.nn.Module as `{name}`, got {type(network).__name__}")
    victim.model.eval()
    part = victim.judge
    chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:TRIED]
    for role, inputs in {"defender": victim.example, "attacker": victim.attacker.inputs[:1]}.items():
        _outputs(who, role, victim, inputs)
    outputs = _outputs(who, "judge", victim, part.inputs[chosen])
    if victim.trained:
        labels = part.labels[chosen]
        _warn_of_chance(who, int((outputs.argmax(1) == labels).sum()), labels)


def _outputs(who: str, role: str, victim: Victim, inputs: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            outputs: object = victim.model(inputs.clone())
    except Exception as error:  # somebody's own network
        raise VictimError(
            f"{who}: the network does not run on the {role}'s images: {type(error).__name__}: "
            f"{first_line(error)}; give inputs that it takes"
        ) from error
    wanted = (len(inputs), victim.classes)
    if not isinstance(outputs, Tensor) or outputs.shape != wanted or not outputs.is_floating_point():
        raise VictimError(
            f"{who}: expected outputs (images, classes), here {wanted}, floating point, got "
            f"{_described(outputs)}; give the number of `classes`, and a network that returns logits alone"
        )
    if not outputs.isfinite().all():
        raise VictimError(
            f"{who}: the network's outputs on the {role}'s images are not finite; see whether its weights are"
        )
    return outputs


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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
