"""Saliency: scores are slopes, of the right sign, and harm is found."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch.nn import functional as F

from attacks.saliency import Saliency
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import (
    Alike,
    PlantedPlacement,
    planted_defense,
    planted_subject,
    random_subject,
)
from deepenc.arena.duel import measure
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense

CPU = torch.device("cpu")


def damaging(slot, shape, victim, generator):
    """Always on, and decisive for the first class."""
    values = 0.01 * torch.randn(shape, generator=generator).abs() + 1.0
    if slot.tensor == "linear.weight":
        values[1:] *= -1
    return values


def weighted(network, channel, factor):
    """The network with what one channel of the second convolution passes on multiplied."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.linear.weight[:, 4 * channel : 4 * channel + 4] *= factor
    return changed


@pytest.mark.parametrize("freeze_norms", [True, False])
@pytest.mark.parametrize("objective", ["loss", "entropy"])
def test_scores_are_central_differences(plant, objective, freeze_norms):
    case = plant(labelled=40, unlabelled=40, positions={"conv2": (3,)}).case
    case.encrypted.double()
    with torch.no_grad():
        case.encrypted.linear.weight.mul_(0.03)  # where predictions are sure, slopes are nothing
    attack = Saliency(objective=objective, images=40, freeze_norms=freeze_norms)
    case.labelled.inputs.data = case.labelled.inputs.double()
    case.unlabelled.inputs.data = case.unlabelled.inputs.double()
    scores = attack.attack(case).scores["conv2"]

    def value(network):
        network.bn1.train(not freeze_norms)
        with torch.no_grad():
            if objective == "loss":
                logits = network(case.labelled.inputs)
                return float(F.cross_entropy(logits, case.labelled.targets, reduction="sum"))
            return float(scipy_entropy(network(case.unlabelled.inputs).softmax(1).numpy(), axis=1).sum())

    for channel in (0, 3, 9):
        rise = value(weighted(case.encrypted, channel, 1.001)) - value(
            weighted(case.encrypted, channel, 0.999)
        )
        assert float(scores[channel]) == pytest.approx(rise / 0.002, rel=1e-3)
        assert abs(rise) > 1e-5


def test_batches_do_not_matter_with_stored_statistics(plant):
    case = plant(labelled=33).case
    one, many = (Saliency(batch_size=size).attack(case).scores for size in (33, 2))
    assert all(torch.allclose(one[name], many[name], rtol=1e-3, atol=1e-4) for name in one)
    assert case.meter.samples == 2 * 33


def test_a_planted_channel_is_found(plant):
    planted = plant(damaging, labelled=64, positions={"conv2": (5, 7)})
    scores = Saliency().attack(planted.case).scores
    assert planted.auc(scores) == {"conv2": 1.0}


def test_absolute_is_the_size_of_the_slope(plant):
    case = plant(labelled=16).case
    signed, absolute = (Saliency(absolute=a).attack(case).scores["conv1"] for a in (False, True))
    assert torch.equal(signed.abs(), absolute) and (signed < 0).any()


@pytest.mark.parametrize("objective", ["loss", "entropy"])
def test_alike_channels_are_not_told_apart(objective):
    defense = Defense(name="alike", placement=PlantedPlacement(count=24), weights=Alike())
    encryption = Encryption.of(random_subject(64), defense, bytes(32))
    case = build_case(encryption, Threat(name="test", labelled=32, unlabelled=32), 1, 2, CPU)
    claim = Saliency(objective=objective).attack(case)
    auc = measure(claim, case, encryption, "test", 10).detection.auc
    assert 0.35 < auc < 0.65  # 72 among 96 channels: four deviations


def test_more_than_chance_on_damage():
    encryption = Encryption.of(planted_subject(256), planted_defense("damage"), bytes(32))
    case = build_case(encryption, Threat(name="test", labelled=200), 1, 2, CPU)
    claim = Saliency().attack(case)
    assert measure(claim, case, encryption, "test", 10).detection.auc > 0.65


def test_three_images_with_batch_statistics(plant):
    case = plant(labelled=3).case
    scores = Saliency(batch_size=2, freeze_norms=False).attack(case).scores
    assert all(
        np.isfinite(values.numpy()).all() and values.dtype == torch.float64 for values in scores.values()
    )


def test_the_case_stays(plant):
    case = plant(labelled=8).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    with torch.no_grad():
        Saliency(freeze_norms=False).attack(case)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())
    assert not case.encrypted.training and all(p.grad is None for p in case.encrypted.parameters())


def test_needs():
    assert Saliency().needs.labelled == 2 and not Saliency().needs.unlabelled
    assert Saliency(objective="entropy").needs.unlabelled == 2
