"""What leaks is removed exactly; the rest is kept, guessed, or handed on."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError

from attacks.collisions import Collisions
from attacks.norms import Norms
from attacks.partial_key import PartialKey
from attacks.recalibrate import Recalibrate
from deepenc.arena.case import Attack, Claim
from deepenc.network.sites import Role

ALL = {"conv1": (1, 4, 9), "conv2": (0, 8)}
HALF = {"conv1": (4, 9), "conv2": (8,)}


def resampled(slot, shape, victim, generator):
    return victim.flatten()[torch.randint(victim.numel(), shape, generator=generator)]


def same(network, other):
    expected = other.state_dict()
    return all(torch.equal(t, expected[n]) for n, t in network.state_dict().items())


@pytest.mark.parametrize("rest", ["keep", "random"])
def test_the_whole_key_gives_back_the_original(plant, rest):
    planted = plant(known=ALL, key_fraction=1.0)
    claim = PartialKey(rest=rest).attack(planted.case)
    assert same(claim.network, planted.original)
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}


def test_what_leaked_is_gone_and_the_rest_is_kept(plant):
    planted = plant(known=HALF)
    claim = PartialKey().attack(planted.case)
    state, whole = claim.network.state_dict(), planted.case.encrypted.state_dict()
    left = [c for c in range(15) if c not in (4, 9)]
    assert torch.equal(state["conv1.weight"], whole["conv1.weight"][left])
    assert state["linear.weight"].shape == (4, 13 * 4)
    assert claim.scores["conv1"].tolist() == [2.0 if c in (4, 9) else 0.0 for c in range(15)]


def test_random_removes_as_many_as_are_missing(plant):
    planted = plant(known=HALF)
    claim = PartialKey(rest="random").attack(planted.case)
    assert claim.network.conv1.weight.shape[0] == claim.network.conv2.weight.shape[0] == 12
    for name, missing in {"conv1": 1, "conv2": 1}.items():
        scores = claim.scores[name]
        assert int((scores == 1).sum()) == missing
        assert (scores == 2).nonzero().flatten().tolist() == list(HALF[name])


def test_random_guesses_are_uniform_and_follow_the_seed(plant):
    guesses = []
    for seed in range(60):
        claim = PartialKey(rest="random").attack(plant(known=HALF, seed=seed).case)
        guesses.append(int((claim.scores["conv1"] == 1).nonzero()))
    counts = torch.bincount(torch.tensor(guesses), minlength=15)
    assert counts[4] == counts[9] == 0
    # 60 draws from 13 channels, 4.6 each: a count over 15 has a chance below 1e-3.
    assert counts.max() <= 15 and int((counts > 0).sum()) >= 9


@pytest.mark.parametrize("then", [Collisions(), "collisions", {"name": "collisions"}])
def test_then_finds_the_rest(plant, then):
    planted = plant(resampled, known=HALF)
    claim = PartialKey(then=then).attack(planted.case)
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}
    for name, known in HALF.items():
        others = [c for c in range(len(claim.scores[name])) if c not in known]
        assert claim.scores[name][list(known)].min() > claim.scores[name][others].max()
    assert claim.network is None  # the arena removes the most suspect


def test_scores_come_back_in_the_numbering_of_the_whole(plant):
    planted = plant(known=HALF)
    claim = PartialKey(then=Norms()).attack(planted.case)
    small = Norms().attack(_narrowed(planted.case))
    left = [c for c in range(15) if c not in (4, 9)]
    assert torch.equal(claim.scores["conv1"][left], small.scores["conv1"])


def _narrowed(case):
    seen = []

    class Spy(Attack):
        """Keeps the case it gets."""

        name: ClassVar[str] = "spy"

        def attack(self, case):
            seen.append(case)
            return Claim(scores={})

    PartialKey(then=Spy()).attack(case)
    return seen[0]


def test_the_case_handed_on_is_the_smaller_one(plant):
    case = plant(known=HALF).case
    handed = _narrowed(case)
    assert handed.allocation == {"conv1": 1, "conv2": 1}
    assert [site.width for site in handed.sites] == [13, 13]
    assert handed.known == {}
    linear = next(s for s in handed.sites[1].slots if s.role is Role.OUTGOING)
    assert linear.block == 4 and handed.encrypted.linear.weight.shape[1] == 13 * 4


def test_a_network_of_the_other_attack_is_claimed(plant):
    planted = plant(known=ALL, key_fraction=1.0, unlabelled=32)
    claim = PartialKey(then=Recalibrate()).attack(planted.case)
    assert claim.network.conv1.weight.shape[0] == 12
    assert planted.case.meter.samples == 32
    assert planted.accuracy(claim.network) > 0.9
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}


def test_without_the_configuration_the_smaller_network_is_claimed(plant):
    planted = plant(known=ALL, key_fraction=1.0, allocation=False)
    assert same(PartialKey(then=Norms()).attack(planted.case).network, planted.original)


def test_needs_are_joined(plant):
    assert PartialKey().needs.key_fraction > 0 and not PartialKey().needs.allocation
    assert PartialKey(rest="random").needs.allocation
    assert PartialKey(then="recalibrate:images=9").needs.unlabelled == 9
    assert PartialKey().needs.missing(plant().case.threat)


def test_two_treatments_are_refused():
    with pytest.raises(ValidationError, match="leave `rest` at 'keep'"):
        PartialKey(rest="random", then="norms")
