"""Ablation: scores are what really happens to the objective, and harm is found."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import logsumexp
from torch import nn

from attacks.ablation import Ablation, ranked, silence
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import Alike, PlantedPlacement, random_subject
from deepenc.arena.duel import measure
from deepenc.arena.metrics import checked_scores
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.network.sites import Role, Site, Slot
from tests.attacks.fills import ruinous

BOTH = {"conv1": 1.0, "conv2": 1.0}


def test_the_loss_falls_by_what_it_falls_by(plant):
    planted = plant(ruinous, labelled=16, positions={"conv2": (2,)})
    case = planted.case
    scores = Ablation(objective="loss", images=16).attack(case).scores

    def loss(network):
        with torch.no_grad():
            logits = network(case.labelled.inputs).double().numpy()
        own = logits[np.arange(16), case.labelled.targets.numpy()]
        return float((logsumexp(logits, axis=1) - own).mean())

    for channel in (0, 2, 7):
        network = copy.deepcopy(case.encrypted)
        with torch.no_grad():
            network.linear.weight[:, 4 * channel : 4 * channel + 4] = 0
        fall = loss(case.encrypted) - loss(network)
        assert float(scores["conv2"][channel]) == pytest.approx(fall, abs=1e-4)


def test_the_size_falls_by_what_it_falls_by_and_finds_what_lets_outputs_grow(plant):
    planted = plant(ruinous, unlabelled=16, positions={"conv2": (2,)})
    case = planted.case
    scores = Ablation(objective="size", images=16).attack(case).scores

    def size(network):
        return network(case.unlabelled.inputs).detach().abs().mean()

    for channel in (0, 2, 7):
        network = copy.deepcopy(case.encrypted)
        with torch.no_grad():
            network.linear.weight[:, 4 * channel : 4 * channel + 4] = 0
        ratio = size(case.encrypted) / size(network)
        assert float(scores["conv2"][channel]) == pytest.approx(float(ratio.log()), abs=1e-4)
    assert planted.auc(scores)["conv2"] == 1.0


@pytest.mark.parametrize("recalibrate", [False, True])
def test_greedy_finds_harm_that_hides_harm(plant, recalibrate):
    planted = plant(ruinous, labelled=64)
    attack = Ablation(mode="greedy", objective="loss", recalibrate=recalibrate)
    claim = attack.attack(planted.case)
    assert planted.auc(claim.scores) == BOTH


def test_greedy_ranks_by_the_order_of_removal(plant):
    planted = plant(ruinous, labelled=32)
    scores = Ablation(mode="greedy", objective="loss", images=32, per_round=2).attack(planted.case).scores
    for name, count in planted.case.allocation.items():
        ordered = scores[name].sort(descending=True).values
        assert (ordered[:count] > ordered[count:].max()).all()
    # 12 + 3 and 12 + 2 channels; conv2 is through after one round, conv1 after two; then all once more.
    first = 2 + 15 + 14
    second = 1 + 13
    assert planted.case.meter.samples == 32 * (first + second)


@pytest.mark.parametrize("objective", ["entropy", "statistics", "size"])
def test_unlabelled_objectives_are_scored(plant, objective):
    case = plant(unlabelled=8).case
    attack = Ablation(objective=objective, images=8)
    checked_scores(attack.attack(case).scores, case.sites, "test")
    assert attack.needs.unlabelled == 8 and not attack.needs.labelled


def test_silence_of_a_contracted_site_takes_what_comes_in():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    slots = (
        Slot("0.weight", 0, Role.INCOMING),
        Slot("0.bias", 0, Role.BIAS),
        Slot("1.weight", 1, Role.OUTGOING),
    )
    silence(network, Site("0", 3, slots, contracted=True), [1])
    assert not network[0].weight[1].any() and network[0].bias[1] == 0 and not network[1].weight[:, 1].any()
    assert network[0].weight[[0, 2]].all() and network[1].weight[:, [0, 2]].all()


def test_ranked_by_hand():
    assert ranked(torch.tensor([0.5, 9.0, -1.0, 2.0]), [2, 0]).tolist() == [10, 9, 11, 2]


@pytest.mark.parametrize("objective", ["loss", "entropy", "statistics", "size"])
def test_alike_channels_are_not_told_apart(objective):
    defense = Defense(name="alike", placement=PlantedPlacement(count=24), weights=Alike())
    encryption = Encryption.of(random_subject(64), defense, bytes(32))
    threat = Threat(name="test", labelled=16, unlabelled=16)
    case = build_case(encryption, threat, 1, 2, torch.device("cpu"))
    attack = Ablation(objective=objective, images=16)
    auc = measure(attack.attack(case), case, encryption, "test", 10).detection.auc
    assert 0.35 < auc < 0.65  # 72 among 96 channels: four deviations


def test_the_case_stays_and_the_claim_repeats(plant):
    case = plant(ruinous, labelled=8).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    attack = Ablation(mode="greedy", objective="loss", images=8, recalibrate=True)
    first, second = (attack.attack(case).scores["conv1"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())


def test_recalibration_is_refused_where_it_means_nothing():
    with pytest.raises(ValidationError, match="mode: greedy"):
        Ablation(recalibrate=True, objective="loss")
    with pytest.raises(ValidationError, match="statistics"):
        Ablation(recalibrate=True, mode="greedy")
