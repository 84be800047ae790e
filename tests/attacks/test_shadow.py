"""A classifier trained on encryptions of one's own sees what the known defense leaves in the weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import deepenc
from attacks import shadow
from attacks.shadow import Shadow, known_defenses
from deepenc.arena.checks.tiny import TinySource
from deepenc.arena.kit.shadows import Sample, side_by_side
from deepenc.arena.metrics import checked_scores
from deepenc.encryption.defense import Defense, Hardening
from deepenc.errors import ClaimError
from deepenc.victims.victim import VictimSource

BOTH = {"conv1": 1.0, "conv2": 1.0}
TENTH = {"name": "proportional", "proportion": 0.1}
FAST = {"encryptions": 3, "trees": 40, "folds": 3}
TINY = {"encryptions": 1, "trees": 5, "folds": 2}


class Smooth(nn.Module):
    """Two sites of smooth kernels, unlike anything drawn at random."""

    def __init__(self, seed: int = 0, width: int = 48) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 5, padding=2, bias=False)
        self.conv2 = nn.Conv2d(width, width, 5, padding=2, bias=False)
        self.conv3 = nn.Conv2d(width, 4, 5, padding=2, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                rough = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * F.avg_pool2d(rough, 3, stride=1, padding=1))

    def forward(self, x):
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))).mean((2, 3))


class SmoothSource(VictimSource):
    """Another network of the same kind."""

    name: ClassVar[str] = "smooth"

    def network(self, cache):
        return Smooth(7, 40).eval(), torch.ones(1, 3, 8, 8)

    def load(self, cache):
        raise AssertionError("the images of one's own networks are not needed")


class Watching(Hardening):
    """Notes what data it is given."""

    name: ClassVar[str] = "watching"
    seen: ClassVar[list] = []

    def harden(self, network, layout, original, rng):
        self.seen.append(None if original.data is None else len(original.data))


def defense(weights="init", **more):
    return Defense.model_validate({"name": "test", "placement": TENTH, "weights": {"name": weights}} | more)


@pytest.fixture
def smooth(plant):
    """Make a case around a smooth network under a defense, and its positions."""

    def make(chosen=None, told=None, **threat):
        chosen = chosen or defense()
        planted = plant(**threat)
        network = Smooth().eval()
        encrypted, key = deepenc.encrypt(network, torch.ones(1, 3, 8, 8), chosen, secret=b"k" * 32)
        planted.case = replace(
            planted.case,
            encrypted=planted.case.meter.watch(encrypted.eval()),
            sites=key.layout().widened_sites(),
            allocation=key.allocation,
            defense=chosen.spec() if told is None else told,
            example=torch.zeros(1, 3, 8, 8),
        )
        planted.positions = dict(key.positions)
        return planted

    return make


@pytest.mark.parametrize("networks", [(), (SmoothSource(),)], ids=["itself", "another"])
@pytest.mark.parametrize("weights", ["samp", "init"])
def test_the_known_defense_is_seen_through(smooth, weights, networks):
    planted = smooth(defense(weights))
    scores = Shadow(networks=networks, **FAST).attack(planted.case).scores
    assert min(planted.auc(scores).values()) >= 0.99
    assert planted.case.meter.samples == 0


def test_boosting_sees_through_it_too(smooth):
    planted = smooth()
    attack = Shadow(networks=(SmoothSource(),), classifier="boosting", encryptions=2, trees=10)
    assert min(planted.auc(attack.attack(planted.case).scores).values()) >= 0.99


def test_what_strategies_share_carries_over(smooth):
    planted = smooth(defense("samp"))
    attack = Shadow(defenses=(defense("init"),), features=("roughness_in", "roughness_out"), **FAST)
    assert min(planted.auc(attack.attack(planted.case).scores).values()) >= 0.95


def test_a_sample_is_cut_among_the_channels_that_were_there_before():
    inserted = np.array([False, True, False, False, True])
    sample = Sample("site", {"a": np.arange(5.0)}, inserted)
    cut = sample.without(np.array([True, False, True]))
    assert cut.rows["a"].tolist() == [1.0, 2.0, 4.0] and cut.inserted.tolist() == [True, False, True]


def test_nothing_is_seen_where_nothing_can_be_known(plant, random_network):
    positions = {"conv1": tuple(range(0, 100, 4)), "conv2": tuple(range(1, 90, 4))}

    def alike(slot, shape, victim, generator):
        return 0.1 * torch.randn(shape, generator=generator)

    planted = plant(alike, network=random_network(75), width=75, positions=positions)
    scores = Shadow(**FAST).attack(planted.case).scores
    # Two sites of 25 and 23 among 98 and more: the deviation of an AUC is below 0.07.
    assert all(0.28 < auc < 0.72 for auc in planted.auc(scores).values())


def test_a_defense_that_is_not_at_hand_is_stood_in_for(smooth):
    planted = smooth(told={"name": "somebody's own", "placement": {"name": "nobody's"}})
    assert [d.name for d in known_defenses(planted.case.defense)] == list(shadow.FAMILY)
    assert min(planted.auc(Shadow(**FAST).attack(planted.case).scores).values()) >= 0.99


def test_without_any_defense_to_learn_from_it_says_what_to_give(smooth, monkeypatch):
    monkeypatch.setattr(shadow, "FAMILY", ("missing",))
    with pytest.raises(ClaimError, match="give `defenses`"):
        Shadow(**FAST).attack(smooth(told={"name": "planted", "placement": {"name": "nobody's"}}).case)


def test_under_the_null_defense_nothing_is_suspected(smooth):
    planted = smooth(told=Defense.of(None).spec())
    scores = Shadow(**FAST).attack(planted.case).scores
    assert {s.name for s in planted.case.sites} == set(scores)
    assert not any(score.any() for score in scores.values())


@pytest.mark.parametrize(("images", "seen"), [({"labelled": 3, "unlabelled": 2}, 5), ({}, None)])
def test_a_hardening_gets_the_attackers_images(smooth, images, seen):
    Watching.seen.clear()
    own = Defense(name="w", placement=TENTH, weights={"name": "init"}, hardening=(Watching(),))
    Shadow(defenses=(own,), encryptions=2, trees=2).attack(smooth(**images).case)
    assert Watching.seen == [seen, seen]


def test_sites_of_other_kinds_are_learnt_together(plant):
    # conv1 has BatchNorm, conv2 a bias; the classifier's network has three sites with BatchNorm.
    planted = plant()
    scores = Shadow(networks=(TinySource(),), **TINY).attack(planted.case).scores
    assert set(checked_scores(scores, planted.case.sites, "test")) == {"conv1", "conv2"}


def test_a_feature_that_a_site_lacks_is_typical():
    rows = {"b": torch.tensor([1.0, 2.0]).numpy()}
    assert side_by_side(rows, ["a", "b"]).tolist() == [[0.0, 1.0], [0.0, 2.0]]


def test_the_seed_decides_and_nothing_outside_is_touched(smooth):
    planted = smooth()
    before = {name: t.clone() for name, t in planted.case.encrypted.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first = Shadow(**TINY).attack(planted.case).scores
        assert not torch.is_grad_enabled()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in planted.case.encrypted.state_dict().items())
    second = Shadow(**TINY).attack(planted.case).scores
    assert all(torch.equal(score, second[name]) for name, score in first.items())
    other = Shadow(**TINY).attack(replace(planted.case, seed=6)).scores
    assert any(not torch.equal(score, other[name]) for name, score in first.items())


def test_networks_and_defenses_are_given_as_in_a_configuration():
    made = Shadow(networks=("cifar10-resnet56",), defenses=("paper-init",))
    assert made.networks[0].name == "cifar10-resnet56" and made.defenses[0].name == "paper-init"
    again = Shadow(**{field: value for field, value in made.spec().items() if field != "name"})
    assert again.spec() == made.spec() and again.defenses[0].weights == made.defenses[0].weights
    assert not Shadow().needs.model_fields_set


@pytest.mark.parametrize("wrong", [{"encryptions": 0}, {"trees": 0}, {"classifier": "oracle"}])
def test_bounds(wrong):
    with pytest.raises(ValidationError):
        Shadow(**wrong)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValidationError, match="unknown victim"):
        Shadow(networks=("cifar10-resnet57",))
