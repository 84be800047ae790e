"""Entries of their own: fewer keys for a dear attack, curves with the references at each point."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from attacks.norms import Norms
from deepenc.arena.plan import Experiment, plan
from deepenc.seeds import Roots

BASE = {
    "name": "plan",
    "victims": ["digits-resnet"],
    "defenses": ["paper-samp"],
    "attacks": ["norms", "finetune"],
    "threats": [{"name": "thief", "labelled": 100}],
    "keys": 4,
}


def cells(**changes):
    return plan(Experiment.model_validate(BASE | changes))


def test_a_dear_attack_is_fought_under_fewer_keys():
    found = cells(attacks=["norms", {"name": "finetune", "keys": 2}])
    on = lambda name: [c.key for c in found if c.entry.label == name and c.defense.protects]  # noqa: E731
    assert on("norms") == [0, 1, 2, 3] and on("finetune") == [0, 1]


def test_an_attack_may_be_kept_to_some_victims():
    victims = ["digits-resnet", "cifar10-resnet20"]
    found = cells(victims=victims, attacks=[{"name": "norms", "victims": ["digits-resnet"]}], keys=1)
    assert {c.victim.label for c in found if c.entry.label == "norms"} == {"digits-resnet"}
    with pytest.raises(ValidationError, match="names victims"):
        cells(attacks=[{"name": "norms", "victims": ["nobody"]}])


def test_a_curve_meets_a_threat_for_every_value_and_so_do_the_references():
    entry = {"name": "finetune", "curve": {"over": "labelled", "values": [10, 100]}}
    found = cells(attacks=["norms", entry], keys=1)
    assert {(c.entry.label, c.threat.labelled, c.threat.name) for c in found if c.defense.protects} == {
        ("norms", 100, "thief"),
        ("finetune", 10, "thief labelled=10"),
        ("finetune", 100, "thief labelled=100"),
        ("null", 100, "thief"),
        ("null", 10, "thief labelled=10"),
        ("null", 100, "thief labelled=100"),
    }
    assert {(c.entry.label, c.threat.labelled) for c in found if not c.defense.protects} == {
        (reference, images) for reference in ("null", "scratch") for images in (10, 100)
    }
    assert len(found) == len(set(found))


def test_the_points_of_a_curve_share_the_seeds_of_their_threat():
    entry = {"name": "finetune", "curve": {"over": "steps", "values": [1, 5]}}
    found = [c for c in cells(attacks=["norms", entry], keys=1) if c.defense.protects]
    root = Roots.of(bytes(32))
    assert len({c.attack_seed(root) for c in found}) == len({c.leak_seed(root) for c in found}) == 1
    assert len({c.identity("v", root, None, "cpu") for c in found}) == len(found)


def test_the_spec_of_an_experiment_makes_an_equal_one():
    entry = {"name": "finetune", "keys": 2, "curve": {"over": "labelled", "values": [10, 20]}}
    experiment = Experiment.model_validate(BASE | {"attacks": [entry, Norms()]})
    assert Experiment.model_validate(experiment.spec()).attacks == experiment.attacks


@pytest.mark.parametrize(
    "curve", [{"over": "weather", "values": [1]}, {"over": "labelled", "values": []}, {"over": "labelled"}]
)
def test_curves_that_cannot_be_meant(curve):
    with pytest.raises(ValidationError):
        cells(attacks=[{"name": "finetune", "curve": curve}])


def test_a_value_out_of_range_is_told_before_the_run():
    curve = {"over": "key_fraction", "values": [0.5, 2.0]}
    with pytest.raises(ValidationError, match="key_fraction"):
        cells(attacks=[{"name": "finetune", "curve": curve}])


def test_the_code_of_nested_plugins_is_part_of_a_cells_identity(monkeypatch):
    import deepenc.arena.plan as module

    nested = {"name": "partial-key", "then": "norms"}
    (cell,) = [c for c in cells(attacks=[nested], keys=1) if c.entry.label == "partial-key"]
    before = cell.identity("v", Roots.of(bytes(32)), None, "cpu")
    seen = []
    monkeypatch.setattr(module, "code_version", lambda plugin: seen.append(plugin.name) or "changed")
    assert cell.identity("v", Roots.of(bytes(32)), None, "cpu") != before
    assert seen[:2] == ["partial-key", "norms"]
