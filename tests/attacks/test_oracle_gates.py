"""Oracle gates: the key comes out of the authorised model's answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import nn

from attacks.oracle_gates import OracleGates, asked, mask
from deepenc.errors import ClaimError
from tests.attacks.fills import ruinous, same

BOTH = {"conv1": 1.0, "conv2": 1.0}


@pytest.mark.parametrize("unlabelled", [100, 0], ids=["images", "noise"])
def test_the_key_is_found(plant, unlabelled):
    planted = plant(ruinous, unlabelled=unlabelled, oracle=100)
    claim = OracleGates(images=100).attack(planted.case)
    assert planted.auc(claim.scores) == BOTH
    assert claim.network is None and planted.case.meter.queries == 100


def test_the_key_of_typical_channels_is_found(plant):
    planted = plant(unlabelled=100, oracle=100)  # the default: independent normal entries
    assert planted.auc(OracleGates(images=100).attack(planted.case).scores) == BOTH


def test_without_a_configuration_the_masked_network_answers_as_the_model_does(plant):
    planted = plant(ruinous, unlabelled=100, oracle=100, allocation=False)
    claim = OracleGates(images=100).attack(planted.case)
    assert np.mean(list(planted.auc(claim.scores).values())) >= 0.99
    assert planted.accuracy(planted.case.encrypted) < 0.6
    assert planted.accuracy(claim.network) > planted.accuracy(planted.original) - 0.03


def test_a_model_that_answers_nothing_about_the_key_tells_nothing(plant, random_network):
    found = []
    for seed in range(4):
        planted = plant(network=random_network(12), unlabelled=16, oracle=16, seed=seed)
        object.__setattr__(planted.case, "oracle", lambda inputs: torch.ones(len(inputs), 4))
        found += planted.auc(OracleGates(images=16, steps=20).attack(planted.case).scores).values()
    assert 0.2 < np.mean(found) < 0.8  # 8 sites of 2 or 3 among 14 or 15 channels: about four deviations


@pytest.mark.parametrize("real", [1, 5, 7])
def test_masks_add_up_against_scipy(real):
    logit = 4 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = brentq(lambda c: expit(logit.numpy() + c).sum() - real, -50, 50)
    assert np.allclose(mask(logit, real).numpy(), expit(logit.numpy() + shift), atol=1e-8)
    assert torch.equal(mask(logit, None), logit.sigmoid())


def test_masks_of_equal_logits():
    assert torch.allclose(mask(torch.full((8,), 3.0), 6), torch.full((8,), 0.75))


def test_inputs_to_ask_are_the_images_held_then_noise(plant):
    case = plant(labelled=3, unlabelled=4, oracle=20).case
    inputs, answers = asked(case, 10, case.generator())
    assert torch.equal(inputs[:4], case.unlabelled.inputs) and torch.equal(inputs[4:7], case.labelled.inputs)
    assert inputs.shape == (10, 1, 6, 6) and inputs[7:].std() > 0.5
    assert answers.shape == (10, 4) and case.meter.queries == 10
    assert len(asked(case, 50, case.generator())[0]) == 10  # all that may still be asked


def test_noise_is_refused_where_it_is_no_input(plant):
    case = plant(oracle=5).case
    object.__setattr__(case, "example", torch.zeros(1, 4, dtype=torch.long))
    assert "no inputs to ask about" in OracleGates(images=5).pointless(case)
    with pytest.raises(ClaimError, match="give the attacker some"):
        OracleGates(images=5).attack(case)


@pytest.mark.parametrize("budget", [{"steps": 0}, {"samples": 7}])
def test_no_budget_asks_nothing_and_claims_the_encrypted_network(plant, budget):
    case = plant(unlabelled=8, oracle=8, **budget).case
    claim = OracleGates(images=8).attack(case)
    assert same(claim.network, case.encrypted)
    assert case.meter.queries == case.meter.samples == 0
    assert all(len(set(values.tolist())) == 1 for values in claim.scores.values())


def test_samples_are_kept_to(plant):
    case = plant(unlabelled=8, oracle=8, samples=20).case
    OracleGates(images=8).attack(case)
    assert case.meter.samples == 16


def test_sites_without_confusion_channels_are_not_masked(plant):
    planted = plant(ruinous, unlabelled=16, oracle=16, positions={"conv1": (), "conv2": (3,)})
    scores = OracleGates(images=16, steps=5).attack(planted.case).scores
    assert not scores["conv1"].any() and scores["conv2"].any()


def test_the_case_stays_and_the_claim_repeats(plant):
    first, second = (plant(ruinous, unlabelled=8, oracle=8).case for _ in range(2))
    before = {name: tensor.clone() for name, tensor in first.encrypted.state_dict().items()}
    first.encrypted.bn1 = nn.Identity()
    second.encrypted.bn1 = nn.Identity()
    one, two = (OracleGates(images=8, steps=4).attack(case).scores for case in (first, second))
    assert all(torch.equal(values, two[name]) for name, values in one.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.encrypted.state_dict().items())


def test_needs():
    assert OracleGates(images=50).needs.oracle == 50 and not OracleGates().needs.unlabelled
