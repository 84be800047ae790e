"""Batteries: what they hold can be run, names find the latest version, published ones stay as they are."""

from __future__ import annotations

import hashlib
import json

import pytest
from pydantic import ValidationError

from deepenc.arena.battery import Battery, battery
from deepenc.arena.plan import Experiment, plan
from deepenc.errors import PluginError
from deepenc.plugins import get, names

PUBLISHED = {
    "quick-1": "b998b2b5ea5780f8",
    "standard-1": "b60f9006bcae5c0a",
}
"""Fingerprints: a changed battery is another version."""


def fingerprint(found: Battery) -> str:
    entries = [[e.label, e.attack.spec(), e.threats] for e in found.attacks]
    content = [entries, [t.model_dump() for t in found.threats]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_battery_stays_as_it_is(name: str) -> None:
    assert fingerprint(get("battery", name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", names("battery"))
def test_every_attack_has_what_it_needs_and_a_reason(name: str) -> None:
    found: Battery = get("battery", name)
    threats = {threat.name: threat for threat in found.threats}
    for entry in found.attacks:
        assert found.why[entry.label]
        for threat in entry.threats or threats:
            assert not entry.attack.needs.missing(threats[threat]), (entry.label, threat)


def test_names_find_the_latest_version() -> None:
    assert battery("quick").name == "quick-1" and battery("standard-1").name == "standard-1"
    with pytest.raises(PluginError, match="unknown battery 'quik': did you mean"):
        battery("quik")


def test_all_holds_every_attack_that_stands_alone() -> None:
    every = battery("all")
    held = {entry.attack.name for entry in every.attacks}
    assert set(names("attack")) - held <= {
        "chain",
        "ensemble",
        "tuned",
        "hill-climb",
        "partial-key",
        "public-checkpoint",
    }
    assert len({entry.label for entry in every.attacks}) == len(every.attacks)


def test_an_experiment_takes_a_battery_by_name() -> None:
    given = {"name": "x", "victims": ["digits-resnet"], "defenses": ["paper-samp"], "attacks": "quick"}
    experiment = Experiment.model_validate(given)
    assert experiment.battery == "quick-1" and experiment.threats == battery("quick").threats
    assert {cell.entry.label for cell in plan(experiment)} == {e.label for e in battery("quick").attacks}
    assert Experiment.model_validate(experiment.spec()).spec() == experiment.spec()
    with pytest.raises(ValidationError, match="names threats"):
        Experiment.model_validate(given | {"threats": [{"name": "other"}]})
    with pytest.raises(ValidationError, match="unknown battery 'qick'"):
        Experiment.model_validate(given | {"attacks": "qick"})
