"""Whatever a network is for: every attack does something to it, or says why it cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from deepenc.arena.build import Encryption, Subject
from deepenc.arena.case import Attack
from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.duel import run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.record import Record
from deepenc.arena.threat import Threat
from deepenc.plugins import get, names
from deepenc.victims.validation import validated
from tests.stories.tiny_detectors import DETECTORS
from tests.stories.tiny_victims import LENGTH, VICTIMS

HELD = 24
"""Examples of each kind that the attacker holds, or as many as the attack needs."""
FEW = {"steps": 4, "trials": 2, "images": 12, "queries": 12, "encryptions": 1, "trees": 10, "warm": 2}
"""Fields that say how long an attack works, where it has them."""


def modes(cls: type[Attack]) -> Iterator[dict[str, Any]]:
    """The defaults, and each choice of each field that has some, in short."""
    own = {name: value for name, value in FEW.items() if name in cls.model_fields}
    yield own
    for name, field in cls.model_fields.items():
        if get_origin(field.annotation) is Literal:
            yield from (own | {name: c} for c in get_args(field.annotation) if c != field.default)


def attacks() -> Iterator[Any]:
    for name in names("attack"):
        cls = get("attack", name)
        for fields in modes(cls):
            try:
                attack = cls(**fields)
            except ValidationError:
                continue  # choices that exclude each other
            said = ",".join(f"{k}={v}" for k, v in fields.items() if k not in FEW)
            yield pytest.param(attack, id=f"{name}:{said}" if said else name)


@cache
def encryption(task: str) -> Encryption:
    subject = Subject.of(validated(VICTIMS[task]()))
    return Encryption.of(subject, host_defense(), hashlib.sha256(b"tasks").digest())


def fought(attack: Attack, task: str) -> Record:
    given = attack.needs.given_by_threats()
    more = {"labelled": max(HELD, given["labelled"]), "unlabelled": max(HELD, given["unlabelled"])}
    threat = Threat(name="generous", **given | more | {"allocation": True, "architecture": True})
    made = encryption(task)
    cell = Cell(TinySource(), made.defense, Entry(attack=attack, label="it"), threat, 0, 0)
    return run_duel(Duel(cell, "id", bytes(32), 5, 6, None, "cpu"), lambda: made)


@pytest.mark.parametrize("task", sorted(VICTIMS))
@pytest.mark.parametrize("attack", list(attacks()))
def test_it_ends_in_order(attack: Attack, task: str) -> None:
    record = fought(attack, task)
    assert record.state in ("done", "unsupported"), record.reason
    if record.state == "unsupported":
        assert record.reason
        return
    assert record.score is not None or record.detection is not None
    assert record.score is None or record.score.measure == encryption(task).subject.victim.task.measure


def test_a_thief_s_data_are_counted_in_tokens_where_there_are_any() -> None:
    null = get("attack", "null")()
    assert fought(null, "classification").held == {}
    # Twice 24 rows of 6 tokens; of texts, the tokens that their masks let through.
    assert fought(null, "next-token").held == {"tokens": 2 * HELD * LENGTH}
    assert HELD * 4 <= fought(null, "text-classification").held["tokens"] < 2 * HELD * LENGTH


def test_every_task_has_a_tiny_victim() -> None:
    assert {*VICTIMS, *DETECTORS} == set(names("task"))


@pytest.mark.parametrize("task", sorted(VICTIMS))
def test_its_victim_is_attacked_for_real(task: str) -> None:
    """Most attacks are done, so that a task which offers nothing cannot pass."""
    victim = encryption(task).subject.victim
    needs = [get("attack", name)().needs for name in names("attack")]
    assert sum(not need.lacking(victim.task) for need in needs) > 0.9 * len(needs)
