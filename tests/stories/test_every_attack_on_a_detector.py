"""Every attack does what it can to a detector, or says what it lacks; every defense gives it back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import deepenc
from deepenc.arena.build import Encryption, Subject
from deepenc.arena.case import Attack
from deepenc.arena.checks.tiny import host_defense
from deepenc.arena.duel import run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import PluginError
from deepenc.plugins import build, get, names
from deepenc.seeds import Roots
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim, VictimSource
from tests.stories.tiny_detectors import DETECTORS

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
FEW = {"images": 8, "encryptions": 1, "trees": 10, "queries": 12}
"""Fields that say how long an attack works, where it has them."""


class Stub(VictimSource):
    """Stands for a victim that the test made."""

    name: ClassVar[str] = "stub"

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        raise NotImplementedError

    def load(self, cache: Path) -> Victim:
        raise NotImplementedError


@cache
def encryption(task: str) -> Encryption:
    return Encryption.of(Subject.of(validated(DETECTORS[task]())), Defense.of("paper-samp"), bytes(32))


def variants() -> Iterator[Any]:
    """Every attack as it is, and with every other choice of each parameter that has few."""
    for name in names("attack"):
        try:
            kind = get("attack", name)
        except PluginError:
            continue
        few = {field: value for field, value in FEW.items() if field in kind.model_fields}
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


@pytest.mark.parametrize("task", DETECTORS)
@pytest.mark.parametrize("attack", [*variants()])
def test_an_attack_ends_well(attack: Attack, task: str) -> None:
    needs = attack.needs.given_by_threats()
    given = {what: max(least, needs[what]) for what, least in GENEROUS.items()}
    threat = Threat(name="generous", **given, steps=3, samples=5000)
    cell = Cell(Stub(), Defense.of("paper-samp"), Entry.model_validate(attack), threat, 0, 0)
    record = run_duel(Duel.of(cell, "told", Roots.of_seed(0), None, "cpu"), lambda: encryption(task))
    assert record.state in ("done", "unsupported"), record.reason
    assert record.state == "done" or record.reason


def defenses() -> Iterator[Any]:
    yield from (pytest.param(Defense.of(name), id=name) for name in names("defense"))
    for kind in ("placement", "weights", "hardening"):
        for name in names(kind):
            few = ":steps=4" if name == "optimise" else ""
            yield pytest.param(host_defense(**{kind: build(kind, name + few)}), id=name)
    yield pytest.param(host_defense(hardening=build("hardening", "optimise:gates=true,steps=4")), id="gates")


@pytest.mark.parametrize("task", ["detection", pytest.param("instance-segmentation", marks=pytest.mark.long)])
@pytest.mark.parametrize("defense", [*defenses()])
def test_a_defense_gives_back_what_it_protects(defense: Defense, task: str) -> None:
    victim = DETECTORS[task]()
    few = [
        step.model_copy(update={"steps": 4}) if step.name == "optimise" else step
        for step in defense.hardening
    ]
    defense = defense.model_copy(update={"hardening": tuple(few)})
    encrypted, key = deepenc.encrypt(
        victim.model, victim.example, defense, seed=0, data=victim.defender, task=victim.task
    )
    inputs = victim.judge.inputs
    with torch.no_grad():
        assert victim.task.complaint(victim.task.run(encrypted, inputs), inputs) is None
    state = deepenc.decrypt(encrypted, key).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in victim.model.state_dict().items())
