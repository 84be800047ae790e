"""Hill climbing: it ends at the key, counts every guess, and keeps to its trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from attacks.hill_climb import HillClimb, swap
from attacks.norms import Norms
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import PlantedPlacement, PlantedWeights, planted_subject
from deepenc.arena.duel import measure
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import ClaimError
from tests.attacks.fills import ruinous


def damaged(**threat):
    """A case of two harmful channels at every site, and what its attacker does not see."""
    placement, weights = PlantedPlacement(count=2), PlantedWeights(weakness="damage")
    defense = Defense(name="damage", placement=placement, weights=weights)
    encryption = Encryption.of(planted_subject(32), defense, bytes([3]) * 32)
    model = Threat(name="test", **({"unlabelled": 32, "trials": 10**5} | threat))
    return build_case(encryption, model, 3, 4, torch.device("cpu")), encryption


def test_a_small_key_is_found_by_trying_all():
    case, encryption = damaged()
    claim = HillClimb(images=32, trials=10**4).attack(case)
    measured = measure(claim, case, encryption, "test", None)
    assert measured.detection.exact_sites == 3
    every = [math.comb(site.width, 2) for site in case.sites]
    assert case.meter.trials == sum(every)  # the sum of the searches, not the product


def test_swaps_find_what_is_too_large_to_enumerate():
    case, encryption = damaged()
    claim = HillClimb(images=32, enumerate_below=0, trials=6000).attack(case)
    assert measure(claim, case, encryption, "test", None).detection.auc >= 0.99
    assert case.meter.trials == 6000


def test_the_loss_finds_a_key(plant):
    planted = plant(ruinous, labelled=64, trials=400, positions={"conv1": (4,), "conv2": (8,)})
    claim = HillClimb(objective="loss", trials=400).attack(planted.case)
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}
    assert planted.case.meter.trials == 400
    assert planted.case.meter.samples == 400 * 64


@pytest.mark.parametrize("objective", ["loss", "verifier"])
def test_trials_are_cut_to_what_is_left(objective):
    case, _ = damaged(labelled=16, unlabelled=16, trials=7)
    attack = HillClimb(objective=objective, images=16)
    assert all(int(s.sum()) == 2 for s in attack.attack(case).scores.values())
    # The three sites share what the verifier may try: 7 // 3, 5 // 2, 3.
    assert case.meter.trials == 7
    attack.attack(case)  # nothing is left: the first guess
    assert case.meter.trials == 7


def test_the_first_guess_is_that_of_another_attack(plant):
    planted = plant(labelled=8, trials=1)
    claim = HillClimb(objective="loss", start=Norms(), images=8).attack(planted.case)
    scores = Norms().attack(planted.case).scores
    for name, count in planted.case.allocation.items():
        order = scores[name].argsort(descending=True, stable=True)[:count]
        assert claim.scores[name].nonzero().flatten().tolist() == sorted(order.tolist())


def test_worse_guesses_are_taken_back(plant):
    planted = plant(ruinous, labelled=32, trials=50)
    start = HillClimb(objective="loss", trials=1, images=32).attack(planted.case).scores
    end = HillClimb(objective="loss", trials=40, images=32).attack(planted.case).scores

    def loss(scores):
        network = planted.case.copy()
        with torch.no_grad():
            network.conv2.weight[:, scores["conv1"].bool()] = 0
            network.linear.weight.view(4, -1, 4)[:, scores["conv2"].bool()] = 0
            images = planted.case.labelled
            return float(torch.nn.functional.cross_entropy(network(images.inputs), images.targets))

    assert loss(end) < loss(start)


def test_a_swap_is_undone_by_another():
    rng = np.random.default_rng(0)
    kept = torch.tensor([True, False, True, True])
    before = kept.clone()
    pair = swap(kept, rng)
    assert int((kept != before).sum()) == 2 and int(kept.sum()) == 3
    kept[pair] = ~kept[pair]
    assert torch.equal(kept, before)


def test_needs_are_declared(plant):
    needs = HillClimb(images=5).needs
    assert needs.trials == 1 and needs.allocation and needs.unlabelled == 5
    assert HillClimb(objective="loss", images=5).needs.labelled == 5
    assert HillClimb().needs.missing(Threat(name="none", unlabelled=64)) == ["trials >= 1 (given 0)"]
    with pytest.raises(ClaimError, match="allocation"):
        HillClimb(images=4).attack(plant(unlabelled=4, trials=3, allocation=False).case)


@pytest.mark.parametrize("objective", ["loss", "verifier"])
def test_the_case_stays_and_the_claim_follows_the_seed(objective):
    case, _ = damaged(labelled=8, unlabelled=8)
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    attack = HillClimb(objective=objective, images=8, trials=20, enumerate_below=0)
    first, second = (attack.attack(case).scores for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = attack.attack(type(case)(**{**vars(case), "seed": 99})).scores
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())


def test_no_key_no_trial(plant):
    planted = plant(labelled=8, unlabelled=8, trials=5, positions={})
    for objective in ("loss", "verifier"):
        scores = HillClimb(objective=objective, images=8).attack(planted.case).scores
        assert not any(s.any() for s in scores.values())
    assert planted.case.meter.trials == 0
