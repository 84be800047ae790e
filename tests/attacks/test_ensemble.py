"""Votes of detectors: the mean rank, nothing dropped in silence."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from attacks.ensemble import Ensemble
from attacks.null import Null
from deepenc.arena.case import Attack, Claim
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError, OutOfBudget


class Says(Attack):
    """Claims given scores for conv1, none for conv2."""

    name: ClassVar[str] = "says"
    scores: tuple[float, ...] = ()

    def attack(self, case):
        return Claim(scores={"conv1": torch.tensor(self.scores)})


class Greedy(Attack):
    """Needs and spends."""

    name: ClassVar[str] = "greedy"
    images: int = 3

    @property
    def needs(self):
        return Needs(labelled=self.images, allocation=True)

    def attack(self, case):
        case.encrypted(torch.zeros(self.images, 1, 6, 6))
        return Claim(scores={site.name: torch.zeros(site.width) for site in case.sites})


def by_hand(*members):
    """Mean of ranks, one comparison after the other."""
    votes = []
    for values in members:
        below = [sum(b < a for b in values) + 0.5 * sum(b == a for b in values) for a in values]
        votes.append(np.array(below) / len(values))
    return votes


def test_votes_are_mean_ranks(plant):
    generator = np.random.default_rng(0)
    first, second = (generator.integers(0, 6, 15).astype(float) for _ in range(2))
    members = Says(scores=tuple(first)), Says(scores=tuple(1e6 * second))
    one, two = by_hand(first, second)
    case = plant().case
    scores = Ensemble(of=members).attack(case).scores
    assert np.allclose(scores["conv1"], (one + two) / 2)
    assert scores["conv1"].dtype == torch.float64
    assert torch.equal(scores["conv2"], torch.full((14,), 0.5, dtype=torch.float64))
    weighted = Ensemble(of=members, weights=(3, 1)).attack(case).scores
    assert np.allclose(weighted["conv1"], (3 * one + two) / 4)


def test_two_halves_of_the_truth_are_the_whole(plant):
    planted = plant()
    halves = [Says(scores=tuple(float(c in found) for c in range(15))) for found in ((1, 4), (4, 9))]
    assert planted.auc(Ensemble(of=halves).attack(planted.case).scores)["conv1"] == 1.0


def test_detectors_by_name_find_copies(plant):
    def resampled(slot, shape, victim, generator):
        return victim.flatten()[torch.randint(victim.numel(), shape, generator=generator)]

    planted = plant(resampled)
    scores = Ensemble(of=["collisions", {"name": "norms"}], weights=[1, 0.1]).attack(planted.case).scores
    assert min(planted.auc(scores).values()) > 0.95
    assert Ensemble() == Ensemble(of=["norms", "collisions"])


def test_what_a_member_raises_ends_the_whole(plant):
    with pytest.raises(OutOfBudget):
        Ensemble(of=[Greedy()]).attack(plant(samples=2).case)
    with pytest.raises(ClaimError, match=r"says.*conv1.*finite"):
        Ensemble(of=[Says(scores=(float("nan"),) * 15)]).attack(plant().case)
    with pytest.raises(ClaimError, match=r"says.*conv1.*\(15,\)"):
        Ensemble(of=[Says(scores=(1.0, 2.0))]).attack(plant().case)
    with pytest.raises(ClaimError, match="'null' claims no scores"):
        Ensemble(of=[Null()]).attack(plant().case)


def test_one_budget_and_all_needs(plant):
    attack = Ensemble(of=[Greedy(), Greedy(images=7), "norms"])
    assert attack.needs == Needs(labelled=7, allocation=True)
    case = plant(labelled=7).case
    attack.attack(case)
    assert case.meter.samples == 10


@pytest.mark.parametrize("fields", [{"weights": [1]}, {"weights": [-1, 1]}, {"weights": [0, 0]}, {"of": []}])
def test_what_cannot_be_meant_is_refused(fields):
    with pytest.raises(ValueError, match=r"weight|at least 1"):
        Ensemble(**fields)
