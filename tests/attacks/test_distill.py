"""Distillation: the authorised model's answers repair or replace the encrypted network, and are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from attacks.distill import Distill
from deepenc.arena.case import Claim
from deepenc.errors import ClaimError
from tests.attacks.fills import oversized, same


def test_answers_repair_the_encrypted_network(plant):
    planted = plant(oversized, unlabelled=150, labelled=50, oracle=300)
    assert planted.accuracy(planted.case.encrypted) < 0.7
    network = Distill(lr=0.05).attack(planted.case).network
    assert planted.accuracy(network) > 0.9
    assert planted.case.meter.queries == 200


def test_answers_teach_a_blank_network(plant):
    planted = plant(oversized, unlabelled=200, oracle=200)
    network = Distill(start="blank", steps=100, lr=0.1).attack(planted.case).network
    assert planted.accuracy(network) > 0.9


def test_the_student_follows_the_answers_and_no_labels(plant):
    case = plant(unlabelled=32, labelled=32, oracle=64).case

    def always_second(inputs):
        return torch.tensor([0.0, 9, 0, 0]).expand(len(inputs), 4)

    object.__setattr__(case, "oracle", always_second)
    network = Distill(steps=60, lr=0.1).attack(case).network
    assert (network(case.unlabelled.inputs).argmax(1) == 1).float().mean() > 0.9


def test_queries_are_kept_to_and_unlabelled_images_come_first(plant):
    case = plant(unlabelled=6, labelled=6, oracle=9).case
    seen = []
    answer = case.oracle

    def watching(inputs):
        seen.append(inputs)
        return answer(inputs)

    object.__setattr__(case, "oracle", watching)
    Distill(queries=20, steps=1).attack(case)
    expected = torch.cat([case.unlabelled.inputs, case.labelled.inputs[:3]])
    assert case.meter.queries == 9 and torch.equal(torch.cat(seen), expected)
    few = plant(unlabelled=6, oracle=9).case
    Distill(queries=4, steps=1).attack(few)
    assert few.meter.queries == 4


def test_temperature_divides_both_models_outputs(plant, monkeypatch):
    planted = plant(unlabelled=8, oracle=8)
    case = planted.case
    given = {}

    def train(case, network, recipe, examples):
        given.update(locals())
        return Claim(network=network)

    monkeypatch.setattr("attacks.distill.train", train)
    Distill(temperature=4).attack(case)
    with torch.no_grad():
        expected = softmax(planted.original(case.unlabelled.inputs).numpy() / 4, axis=1)
        assert np.allclose(given["examples"].targets.numpy(), expected, atol=1e-5)
        mean = case.task.loss(given["network"], *given["examples"].batch(), temperature=4)
        logs = log_softmax(case.encrypted(case.unlabelled.inputs).numpy() / 4, axis=1)
        assert float(mean) == pytest.approx(-(expected * logs).sum(1).mean(), abs=1e-5)
    assert given["recipe"].temperature == 4


def test_an_unprotected_network_has_nothing_to_learn(plant):
    clean = plant(positions={}, unlabelled=64, oracle=64)
    assert clean.accuracy(Distill(steps=10).attack(clean.case).network) > 0.95


@pytest.mark.parametrize("start", ["encrypted", "blank"])
@pytest.mark.parametrize("budget", [{"steps": 0}, {"samples": 3}])
def test_no_budget_asks_nothing_and_leaves_the_start(plant, start, budget):
    case = plant(unlabelled=8, oracle=8, **budget).case
    claim = Distill(start=start).attack(case)
    assert same(claim.network, case.encrypted if start == "encrypted" else case.blank(case.seed))
    assert case.meter.queries == case.meter.samples == 0 and not claim.network.training


def test_steps_are_kept_to(plant):
    case = plant(unlabelled=32, oracle=32, steps=3).case
    with case.meter.running():
        Distill().attack(case)
    assert (case.meter.steps, case.meter.samples) == (3, 96)


def test_the_case_stays_and_the_claim_repeats(plant):
    cases = [plant(unlabelled=8, oracle=8).case for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in cases[0].encrypted.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (Distill(steps=3).attack(case).network for case in cases)
    assert torch.equal(state, torch.get_rng_state()) and same(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cases[0].encrypted.state_dict().items())
    assert all(p.requires_grad for p in first.parameters())


def test_what_is_missing_is_said(plant):
    assert Distill().needs.oracle == 2 and not Distill().needs.architecture
    assert Distill(start="blank").needs.architecture
    with pytest.raises(ClaimError, match="oracle"):
        Distill().attack(plant(unlabelled=4).case)
    with pytest.raises(ClaimError, match="architecture"):
        Distill(start="blank").attack(plant(unlabelled=4, oracle=4, architecture=False).case)
