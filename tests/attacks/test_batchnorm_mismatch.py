"""Stored against measured statistics: wrong ones are found, right ones are not suspected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attacks.batchnorm_mismatch import BatchnormMismatch, along, mismatch
from deepenc.analysis.batchnorm import Moments, reestimate
from deepenc.arena.checks.selftest import selftest
from deepenc.network.sites import Role


def wrong_statistics(slot, shape, victim, generator):
    if slot.role is Role.MEAN:
        return torch.full(shape, 5.0)
    values = victim.mean() + victim.std() * torch.randn(shape, generator=generator)
    return values.abs() if slot.role is Role.VARIANCE else values


@pytest.mark.parametrize("live", [False, True])
def test_wrong_statistics_are_found_exactly(plant, live):
    planted = plant(wrong_statistics, unlabelled=64)
    scores = BatchnormMismatch(images=64, live=live).attack(planted.case).scores
    assert set(scores) == {"conv1"}  # conv2 has no BatchNorm
    assert planted.auc(scores | {"conv2": torch.zeros(14)})["conv1"] == 1.0
    assert planted.case.meter.samples == 64


@pytest.mark.parametrize("live", [False, True])
def test_the_selftest_is_passed(live):
    assert selftest(BatchnormMismatch(live=live)) is None


def test_right_statistics_tell_nothing(plant, random_network):
    positions = {"conv1": tuple(range(0, 200, 4))}
    planted = plant(network=random_network(150), width=150, positions=positions, unlabelled=64)
    reestimate(planted.case.encrypted, planted.case.unlabelled.inputs)
    scores = BatchnormMismatch(images=64).attack(planted.case).scores
    assert float(scores["conv1"].max()) < 1e-3
    assert 0.35 < planted.auc(scores | {"conv2": torch.zeros(150)})["conv1"] < 0.65


def test_mismatch_by_hand():
    stored = Moments(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0]))
    measured = Moments(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 36.0, 0.0]))
    # Two deviations away; three times the deviation; a channel that never fires, and did not.
    assert mismatch(measured, stored).tolist() == pytest.approx([4.0, 4.0, 1.0])


def test_a_site_sums_over_its_layers(plant):
    site = plant().case.sites[0]
    far = torch.arange(15, dtype=torch.float64)
    assert torch.allclose(along(site, {"bn1": far}), far.log1p())
    assert along(site, {}) is None


def test_without_batch_norm_nothing_is_suspected(plant):
    planted = plant(unlabelled=8)
    planted.case.encrypted.bn1 = nn.Identity()
    assert BatchnormMismatch(images=8).attack(planted.case).scores == {}


def test_the_case_stays_and_the_claim_repeats(plant):
    case = plant(wrong_statistics, unlabelled=16).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    attack = BatchnormMismatch(images=16)
    first, second = (attack.attack(case).scores["conv1"] for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float64
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())
    assert attack.needs.unlabelled == 16
