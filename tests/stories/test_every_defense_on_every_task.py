"""Whatever a network is for: every defense protects it and gives it back, or says why it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepenc
from deepenc.arena.build import Encryption, Subject
from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.duel import run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError
from deepenc.plugins import build, names
from tests.stories.tiny_victims import VICTIMS

PARTS = [(kind, name) for kind in ("placement", "weights", "hardening") for name in names(kind)]
HARDLY = [("hardening", "calibrate")]
"""What nothing can be done with where there is no BatchNorm."""


def defenses() -> list[Any]:
    made = [pytest.param(Defense.of(name), id=name) for name in names("defense")]
    for kind, name in PARTS:
        made.append(pytest.param(host_defense(**{kind: build(kind, name)}), id=name))
    gates = build("hardening", "optimise:gates=true,steps=4")
    return [*made, pytest.param(host_defense(hardening=gates), id="optimise:gates")]


@pytest.mark.parametrize("task", sorted(VICTIMS))
@pytest.mark.parametrize("defense", defenses())
def test_it_protects_and_gives_back(defense: Defense, task: str) -> None:
    victim = VICTIMS[task]()
    options = {"seed": 0, "data": victim.defender, "task": victim.task}
    try:
        encrypted, key = deepenc.encrypt(victim.model, victim.example, defense, **options)
    except ConfigError as error:
        refused = {(part.kind, part.name) for part in defense.hardening}
        assert refused & set(HARDLY) and "no confusion channel has BatchNorm" in str(error)
        return
    with torch.no_grad():
        outputs = victim.task.run(encrypted, victim.judge.inputs)
    assert victim.task.complaint(outputs, victim.judge.inputs) is None
    state = deepenc.decrypt(encrypted, key).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in victim.model.state_dict().items())


def test_a_cell_whose_defense_cannot_be_made_says_so() -> None:
    victim = VICTIMS["regression"]()
    defense = host_defense(hardening=build("hardening", "calibrate"))
    entry = Entry(attack=build("attack", "null"), label="null")
    duel = Duel(
        Cell(TinySource(), defense, entry, Threat(name="thief"), 0, 0), "id", bytes(32), 5, 6, None, "cpu"
    )
    record = run_duel(duel, lambda: Encryption.of(Subject.of(victim), defense, bytes(32)))
    assert record.state == "unsupported"
    assert record.reason is not None and "no confusion channel has BatchNorm statistics" in record.reason
