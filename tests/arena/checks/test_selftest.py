"""Attacks that work pass their self-test; blind, clairvoyant and broken ones do not."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from attacks.batchnorm_defaults import BatchNormDefaults
from attacks.norms import Norms
from deepenc.arena.case import Attack, Claim, Weakness
from deepenc.arena.checks.planted import planted_defense, planted_subject, random_subject
from deepenc.arena.checks.selftest import _encryption, _random_encryption, selftest
from deepenc.arena.kit.descent import descend
from deepenc.network.surgery import narrow_sites
from deepenc.plugins import build, get, names


class Chance(Attack):
    """Scores at random."""

    name: ClassVar[str] = "chance"
    detects: ClassVar[Weakness | None] = "loud"

    def attack(self, case):
        generator = case.generator()
        return Claim(scores={s.name: torch.rand(s.width, generator=generator) for s in case.sites})


class Clairvoyant(Norms):
    """Sees where nothing is to be seen: the last channels of every site."""

    name: ClassVar[str] = "clairvoyant"

    def attack(self, case):
        if case.defense["name"] != "alike":
            return super().attack(case)
        positions = _random_encryption(256).key.positions
        scores = {}
        for site in case.sites:
            scores[site.name] = torch.zeros(site.width)
            scores[site.name][list(positions[site.name])] = 1
        return Claim(scores=scores)


class Broken(Chance):
    """Raises."""

    def attack(self, case):
        raise ZeroDivisionError("planted")


class Promising(Broken):
    """Promises nothing."""

    detects: ClassVar[Weakness | None] = None


def test_a_blind_attack_is_found_out():
    assert "on the planted weakness 'loud' it got no further than AUC 0." in selftest(Chance())


def test_a_clairvoyant_attack_is_found_out():
    assert selftest(Clairvoyant()) == "where nothing can be known, it claims to know it: AUC 1.00"


class Tiring(BatchNormDefaults):
    """Sees what it should, and ruins the network the more it trains."""

    name: ClassVar[str] = "tiring"

    def attack(self, case):
        scores = super().attack(case).scores
        network = case.copy()
        descend(case, [network.fc.bias], lambda: -network.fc.bias[0], steps=80, lr=0.1)
        return Claim(scores=scores, network=network)


def test_an_attack_that_gets_worse_with_its_budget_is_found_out():
    assert "with 80 steps it does worse than with 10: accuracy falls by" in selftest(Tiring())


def test_an_attack_that_raises_is_not_relied_on():
    assert selftest(Broken()) == "in the self-test it raised ZeroDivisionError: planted"


def test_who_promises_nothing_is_not_tested():
    assert selftest(Promising()) is None


@pytest.mark.parametrize("name", [n for n in names("attack") if get("attack", n).detects])
def test_built_in_attacks_keep_their_promise(name):
    assert selftest(build("attack", name)) is None


@pytest.mark.parametrize(
    "weakness", ["loud", "duplicates", "defaults", "statistics", "noise", "damage", "clones"]
)
def test_planted_channels_can_be_taken_out(weakness):
    encryption = _encryption(weakness, 64)
    layout = encryption.key.layout()
    assert sum(map(len, encryption.key.positions.values())) == 12
    assert narrow_sites(layout.widened_sites(), encryption.key.positions) == layout.sites
    assert planted_defense(weakness).protects


def test_trained_looking_weights_are_of_low_rank_and_random_ones_are_not():
    def share(model):
        values = torch.linalg.svdvals(model.conv3.weight.detach().flatten(1))
        return float(values[:4].square().sum() / values.square().sum())

    assert share(planted_subject(64).victim.model) > 0.98
    assert share(random_subject(64).victim.model) < 0.5
