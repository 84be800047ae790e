"""What can be searched, and what contradicts itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from deepenc.arena.checks.tiny import TinySource, tiny_subject
from deepenc.config import load_search
from deepenc.errors import ConfigError
from deepenc.plugins import _loaded, register
from deepenc.study.search import Search, size
from deepenc.study.space import every, identity, points
from deepenc.study.trials import ordered, tuning_part


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    register(TinySource, "tests")
    yield
    _loaded.pop(("victim", "tiny"), None)


def search(**fields: object) -> Search:
    plain: dict[str, object] = {
        "name": "s",
        "victim": "tiny",
        "space": {"weights": ["samp", "conditional"], "placement.proportion": {"low": 0.02, "high": 0.1}},
        "attacks": ["norms"],
        "objectives": ["damage-per-memory"],
    }
    return Search.model_validate(plain | fields)


def test_a_variant_is_the_base_with_the_values_of_the_trial() -> None:
    found = search().variant({"weights": "conditional", "placement.proportion": 0.04})
    assert (found.name, found.weights.name, found.placement.proportion) == ("s", "conditional", 0.04)


def test_a_parameter_follows_the_plugin_that_has_it() -> None:
    space = {"hardening": [None, "calibrate", "calibrate + optimise"], "hardening.1.steps": [5, 9]}
    tuned = search(space=space)
    full = tuned.variant({"hardening.1.steps": 9, "hardening": "calibrate + optimise"})
    assert [step.name for step in full.hardening] == ["calibrate", "optimise"]
    assert full.hardening[1].steps == 9
    assert tuned.variant({"hardening": None, "hardening.1.steps": 9}).hardening == ()
    # Steps of a hardening that is not there make no difference: 1 + 1 + 2 defenses, of 6 points.
    assert size(tuned.space) == len(every(tuned.space)) == 6
    assert len(points(tuned) or ()) == 4
    assert identity(tuned, {"hardening": None, "hardening.1.steps": 5}) == identity(
        tuned, {"hardening": None, "hardening.1.steps": 9}
    )


def test_the_search_starts_at_the_base_where_the_space_holds_it() -> None:
    assert search().start() == {"weights": "samp", "placement.proportion": 0.05}
    assert search(base="paper-init").start() is None


def test_what_the_base_does_not_have_takes_any_value_at_the_start() -> None:
    space = {"hardening": [None, "optimise"], "hardening.0.steps": [30, 60], "weights": ["samp", "init"]}
    found = search(space=space)
    start = found.start()
    assert start == {"hardening": None, "hardening.0.steps": 30, "weights": "samp"}
    assert found.variant(start, found.base.name).spec() == found.base.spec()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objectives": ["memory"]}, "inserting next to nothing"),
        ({"objectives": ["memory", "detectability"]}, "inserting next to nothing"),
        ({"objectives": ["damage"]}, "all the memory"),
        ({"objectives": ["worst-advantage"]}, "all the memory"),
        ({"objectives": ["damage", "damage", "memory"]}, "twice"),
        ({"objectives": ["damage-per-memory", "memory"]}, "contradicts memory"),
        ({"objectives": ["damage-per-memory", "gain"], "lam": 1.0}, "contradicts gain"),
        ({"objectives": ["gain"]}, "lam"),
        ({"lam": 2.0}, "lam"),
        ({"measure": "features"}, "measure is for the objective gain"),
        ({"objectives": ["gain"], "lam": 1.0, "measure": "feature"}, "'features:NAME'"),
        ({"objectives": ["worst-advantage"], "memory": 0.1, "attacks": ["scratch"]}, "need attacks"),
        ({"objectives": ["smallest"]}, "worst-advantage"),
        ({"space": {"weights.steps": [1, 2]}}, "weights.steps"),
        ({"space": {"weights": ["sampp"]}}, "did you mean 'samp'"),
        ({"space": {"placement.proportion": {"low": 0.0, "high": 0.1}}}, "greater than 0"),
        ({"space": {"name": ["a", "b"]}}, "changes nothing"),
        ({"base": "null"}, "placement and weights"),
        ({"name": "paper-samp"}, "another defense"),
        ({"attacks": ["finetune"]}, "needs"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=said):
        search(**fields)


def test_files_that_are_no_search_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    for text in ("- a\n", "name: [\n", "name: x\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"search\.yaml"):
            load_search(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_search(tmp_path / "none.yaml")


def test_the_ready_search_loads() -> None:
    found = load_search(Path(__file__).parents[2] / "configs" / "tune_digits.yaml")
    assert found.name == "tune_digits"
    assert found.fresh_keys >= 2, "a number without a second key has no interval"


def test_the_search_sees_none_of_the_judge_s_images() -> None:
    victim = tiny_subject().victim
    part = tuning_part(victim, 0.25)
    assert (len(part.judge), len(part.defender), len(part.attacker)) == (16, 48, len(victim.attacker))
    judges = {tuple(image.flatten().tolist()) for image in victim.judge.inputs}
    ours = {tuple(image.flatten().tolist()) for image in part.judge.inputs}
    rest = {tuple(image.flatten().tolist()) for image in part.defender.inputs}
    whole = {tuple(image.flatten().tolist()) for image in victim.defender.inputs}
    assert ours | rest == whole and not ours & rest and not ours & judges
    with pytest.raises(ConfigError, match="held_out"):
        tuning_part(victim, 0.001)


def test_attacks_are_fought_as_listed_each_under_all_keys() -> None:
    tuned = search(attacks=["collisions", "norms", "null"], keys=2)
    order = [(c.entry.label, c.key) for c in ordered(tuned, tuned.base)]
    assert order == [(label, key) for label in ("null", "collisions", "norms") for key in (0, 1)]
