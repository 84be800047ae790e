"""Activation statistics: each against an independent one, and on planted channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score

from attacks.activations import Activations, dead, redundancy, selectivity, sparsity
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import Alike, PlantedPlacement, random_subject
from deepenc.arena.duel import measure
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.network.sites import Role

STATISTICS = ["dead", "sparsity", "redundancy", "selectivity"]


@pytest.fixture
def values():
    """Rectified values of 6 channels; the last is constant, the one before never fires."""
    values = torch.randn(20, 6, 9, generator=torch.Generator().manual_seed(0)).clamp_min(0)
    values[:, 4], values[:, 5] = 0, 3
    values[::2, 3] = 0
    return values


def test_dead_and_sparsity_by_hand(values):
    assert dead(values).tolist() == [0, 0, 0, 0.5, 1, 0]
    expected = [float((values[:, c] == 0).double().mean()) for c in range(6)]
    assert sparsity(values).tolist() == pytest.approx(expected)


def test_redundancy_is_the_largest_correlation_of_numpy(values):
    rows = values[:, :4].transpose(0, 1).flatten(1).numpy()
    expected = np.abs(np.corrcoef(rows) - np.eye(4)).max(1)
    assert redundancy(values).tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)


def test_selectivity_is_the_explained_variance_of_scikit_learn(values):
    labels = torch.tensor([3, 7, 7, 0] * 5)
    means = values.mean(2).numpy()
    found = selectivity(values, labels)
    for channel in range(4):
        classes = {k: means[labels == k, channel].mean() for k in (0, 3, 7)}
        guessed = [classes[int(k)] for k in labels]
        assert float(found[channel]) == pytest.approx(r2_score(means[:, channel], guessed), abs=1e-5)
    assert found[4] == found[5] == 0


def silent(slot, shape, victim, generator):
    if slot.role is Role.SHIFT or slot.role is Role.BIAS:
        return torch.full(shape, -1e3)
    return 0.1 * torch.randn(shape, generator=generator).abs()


def uncorrelated(slot, shape, victim, generator):
    """Constant: correlated with nothing."""
    if slot.role in (Role.SHIFT, Role.BIAS):
        return torch.ones(shape)
    return torch.zeros(shape)


def always_on(slot, shape, victim, generator):
    if slot.role is Role.SHIFT or slot.role is Role.BIAS:
        return torch.full(shape, 1e3)
    return 0.1 * torch.randn(shape, generator=generator).abs()


@pytest.mark.parametrize(
    ("statistic", "fill"),
    [("dead", silent), ("sparsity", always_on), ("selectivity", silent), ("redundancy", uncorrelated)],
)
def test_planted_channels_are_found(plant, statistic, fill):
    planted = plant(fill, labelled=64, unlabelled=64)
    auc = planted.auc(Activations(statistic=statistic).attack(planted.case).scores)
    assert auc["conv1"] >= 0.9  # behind conv2, pooled values are hardly ever 0
    assert planted.case.meter.samples == 64


@pytest.mark.parametrize("statistic", STATISTICS)
def test_alike_channels_are_not_told_apart(statistic):
    defense = Defense(name="alike", placement=PlantedPlacement(count=24), weights=Alike())
    encryption = Encryption.of(random_subject(64), defense, bytes(32))
    threat = Threat(name="test", labelled=16, unlabelled=16)
    case = build_case(encryption, threat, 1, 2, torch.device("cpu"))
    claim = Activations(statistic=statistic, images=16).attack(case)
    auc = measure(claim, case, encryption, "test", 10).detection.auc
    assert 0.35 < auc < 0.65  # 72 among 96 channels: four deviations


def test_needs_are_declared():
    assert Activations(statistic="selectivity", images=9).needs.labelled == 9
    assert Activations(images=9).needs.unlabelled == 9 and not Activations().needs.labelled
