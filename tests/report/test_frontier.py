"""Frontiers: advantages worked out by hand, from 10 (scratch) and 90 (original) right of 100."""

from __future__ import annotations

from deepenc.arena.record import Record
from deepenc.arena.threat import Threat
from deepenc.report.frontier import frontiers
from deepenc.report.markdown import markdown

THIEF = Threat(name="thief")


def record(attack: str, defense: str, value: int | None, correct: int, key: int = 0) -> Record:
    threat = THIEF.name if value is None else THIEF.at("labelled", value).name
    reference = {"null": "floor", "scratch": "scratch"}.get(attack)
    return Record(
        cell=f"{attack} {defense} {value} {key}", victim="tiny", defense=defense, attack=attack,
        threat=threat, key=key, repeat=0, protected=defense != "null", reference=reference,
        state="done", score={"value": (correct) / 100, "examples": 100},
    )  # fmt: skip


def run(tuned: dict[int, int], unlabelled: int = 0) -> list[Record]:
    found = [record("free", "d", None, unlabelled)] if unlabelled else []
    for value, correct in tuned.items():
        found += [
            record("null", "null", value, 90),
            record("scratch", "null", value, 10),
            record("tune", "d", value, correct),
        ]
    return found


def test_the_last_value_before_the_advantage_is_too_large() -> None:
    (found,) = frontiers(run({10: 12, 50: 18, 100: 19, 500: 50}))
    advantages = [round(p.advantage.mean, 4) for p in found.points.values()]
    assert advantages == [0.025, 0.1, 0.1125, 0.5]
    assert found.holds == 50


def test_none_where_the_least_is_too_much() -> None:
    (found,) = frontiers(run({10: 80, 50: 12}))
    assert found.holds is None


def test_an_attack_off_the_curve_counts_everywhere() -> None:
    (found,) = frontiers(run({10: 12, 50: 50}, unlabelled=30))
    assert [round(p.advantage.mean, 4) for p in found.points.values()] == [0.25, 0.5]
    assert found.holds is None


def test_another_limit() -> None:
    (found,) = frontiers(run({10: 12, 50: 50}), tolerable=0.5)
    assert found.holds == 50


def test_a_run_without_curves_has_none() -> None:
    assert frontiers([record("tune", "d", None, 50)]) == []


def test_the_table_says_it() -> None:
    text = markdown(run({10: 14, 50: 50}))
    assert "| d | 0.05 [too few keys] | 0.50 [too few keys] | 10 |" in text
