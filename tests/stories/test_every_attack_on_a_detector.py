"""Every attack of the registry does what it can to a detector, or says what it lacks; none fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deepenc.arena.build import Encryption, Subject
from deepenc.arena.case import Attack
from deepenc.arena.duel import run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import PluginError
from deepenc.plugins import get, names
from deepenc.seeds import Roots
from deepenc.tasks.detection import Detection, InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.shapes import Shapes
from deepenc.victims.detectors import small_rcnn
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource

pytest.importorskip("faster_coco_eval")

GENEROUS = {
    "labelled": 16,
    "unlabelled": 16,
    "key_fraction": 0.5,
    "public_checkpoint": True,
    "releases": 1,
    "oracle": 40,
    "trials": 10,
}
"""What an attack is given at least."""


def detector(masks: bool) -> Victim:
    """A small R-CNN that has learnt a little, on few images."""
    task = InstanceSegmentation(classes=3) if masks else Detection(classes=3)

    def part(count: int, first: int) -> Examples:
        data = Shapes(count, first=first, masks=masks)
        return Examples(*task.collate([data[i] for i in range(count)]))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_rcnn(masks=masks)
    defender = part(48, 0)
    generator = torch.Generator().manual_seed(0)
    assert fit(model, task, defender, Recipe(steps=60, lr=0.02, batch_size=8), generator)
    public = copy.deepcopy(model)
    assert fit(public, task, defender, Recipe(steps=2, lr=0.02, batch_size=8), generator)
    return Victim("detector", model, task, defender, part(600, 1000), part(12, 2000), "told", public)


TINY = {"detection": lambda: detector(False), "instance-segmentation": lambda: detector(True)}
"""A small victim of each task."""


class Stub(VictimSource):
    """Stands for a victim that the test made."""

    name: ClassVar[str] = "stub"

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        raise NotImplementedError

    def load(self, cache: Path) -> Victim:
        raise NotImplementedError


@cache
def encryption(task: str) -> Encryption:
    return Encryption.of(Subject.of(TINY[task]()), Defense.of("paper-samp"), bytes(32))


def variants() -> Iterator[Any]:
    """Every attack as it is, and with every other choice of each parameter that has few."""
    for name in names("attack"):
        try:
            kind = get("attack", name)
        except PluginError:
            continue
        few = {"images": 8} if "images" in kind.model_fields else {}
        yield pytest.param(kind(**few), id=name)
        for field, told in kind.model_fields.items():
            if get_origin(told.annotation) is Literal:
                for value in get_args(told.annotation):
                    if value == told.default:
                        continue
                    try:
                        yield pytest.param(kind(**few, **{field: value}), id=f"{name}-{field}-{value}")
                    except ValidationError:
                        continue  # the choice asks for another one beside it


@pytest.mark.parametrize("task", TINY)
@pytest.mark.parametrize("attack", [*variants()])
def test_an_attack_ends_well(attack: Attack, task: str) -> None:
    needs = attack.needs.given_by_threats()
    given = {what: max(least, needs[what]) for what, least in GENEROUS.items()}
    threat = Threat(name="generous", **given, steps=3, samples=5000)
    cell = Cell(Stub(), Defense.of("paper-samp"), Entry.model_validate(attack), threat, 0, 0)
    record = run_duel(Duel.of(cell, "told", Roots.of_seed(0), None, "cpu"), lambda: encryption(task))
    assert record.state in ("done", "unsupported", "out_of_budget"), record.reason
    assert record.state == "done" or record.reason
