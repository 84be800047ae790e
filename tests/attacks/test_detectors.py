"""Norms and collisions: planted tells are found exactly, and nothing is seen where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.collisions import Collisions, Values
from attacks.norms import Norms
from deepenc.network.sites import Role

BOTH = {"conv1": 1.0, "conv2": 1.0}


def resampled(slot, shape, victim, generator):
    """The paper's samp: entries drawn from the same tensor, with replacement."""
    drawn = torch.randint(victim.numel(), shape, generator=generator)
    return victim.flatten()[drawn]


def only(role, fill):
    """Confusion entries of one kind, and fresh typical ones for the rest."""

    def made(slot, shape, victim, generator):
        plain = victim.mean() + victim.std() * torch.randn(shape, generator=generator)
        return fill(slot, shape, victim, generator) if slot.role is role else plain

    return made


def tenfold(slot, shape, victim, generator):
    return 10 * victim.std() * torch.randn(shape, generator=generator)


def tenth(slot, shape, victim, generator):
    return 0.1 * victim.std() * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("role", [Role.INCOMING, Role.OUTGOING])
@pytest.mark.parametrize("fill", [tenfold, tenth])
def test_norms_finds_outliers_on_either_side(plant, random_network, role, fill):
    planted = plant(only(role, fill), network=random_network(12))
    assert planted.auc(Norms().attack(planted.case).scores) == BOTH


def test_norms_is_at_chance_where_all_weights_are_alike(plant, random_network):
    positions = {"conv1": tuple(range(0, 200, 4)), "conv2": tuple(range(1, 190, 5))}
    planted = plant(network=random_network(150), width=150, positions=positions)
    # Two sites of 50 and 38 among 190 and more: the deviation of an AUC is below 0.05.
    for auc in planted.auc(Norms().attack(planted.case).scores).values():
        assert 0.35 < auc < 0.65


def test_norms_are_robust_z_scores_of_log_norms(plant):
    case = plant(tenfold).case
    rows = case.encrypted.conv1.weight.detach().double().flatten(1).numpy()
    columns = case.encrypted.conv2.weight.detach().double().transpose(0, 1).flatten(1).numpy()
    expected = []
    for side in (rows, columns):
        logs = np.log(np.linalg.norm(side, axis=1))
        away = np.abs(logs - np.median(logs))
        expected.append(away / (1.4826 * np.median(away)))
    assert Norms().attack(case).scores["conv1"].tolist() == pytest.approx(np.max(expected, axis=0), rel=1e-3)


def test_collisions_finds_sampled_weights_exactly(plant):
    planted = plant(resampled)
    assert planted.auc(Collisions().attack(planted.case).scores) == BOTH


@pytest.mark.parametrize("role", [Role.INCOMING, Role.OUTGOING])
def test_collisions_needs_only_one_side(plant, role):
    planted = plant(only(role, resampled))
    assert planted.auc(Collisions().attack(planted.case).scores) == BOTH


def test_collisions_tells_the_copy_from_the_copied(plant):
    # Confusion channel 0 of conv2 repeats the whole incoming row of real channel 3, and its outgoing weights
    # are drawn from all over: of the two equal rows, it is the forgery.
    def row_of_three(slot, shape, victim, generator):
        if slot.role is Role.INCOMING:
            return victim[3:4]
        return resampled(slot, shape, victim, generator)

    planted = plant(row_of_three, positions={"conv2": (0,)})
    scores = Collisions().attack(planted.case).scores["conv2"]
    assert scores[0] > 0.9
    assert scores[1:].max() < 0.3  # real channel 3, now at position 4, is cleared


def test_collisions_is_at_chance_without_copies(plant, random_network):
    planted = plant(network=random_network(40), width=40, positions={"conv1": (3, 8, 30), "conv2": (0, 11)})
    scores = Collisions().attack(planted.case).scores
    assert all(auc == pytest.approx(0.5, abs=0.2) for auc in planted.auc(scores).values())
    assert max(float(s.max()) for s in scores.values()) < 0.01


def test_collisions_ignores_zeros(plant, random_network):
    zeros = lambda slot, shape, victim, generator: torch.zeros(shape)  # noqa: E731
    planted = plant(zeros, network=random_network(12))
    assert max(float(s.max()) for s in Collisions().attack(planted.case).scores.values()) < 0.01


def test_values_by_hand():
    held = Values(torch.tensor([[1.0, 2.0, 0.0], [2.0, 3.0, -0.0], [2.0, 1.5, 0.0]]))
    assert held.repeated.tolist() == [[False, True, False], [True, False, False], [True, False, False]]
    # Rows are suspect by 0.1, 0.5, 0.1: of the three 2s only that of the middle row is a copy.
    copied = held.copied(torch.tensor([[0.1], [0.5], [0.1]], dtype=torch.float64))
    assert copied.tolist() == [[False] * 3, [True, False, False], [False] * 3]


@pytest.mark.parametrize("attack", [Norms(), Collisions()])
def test_detectors_leave_the_case_alone(plant, attack):
    planted = plant(resampled)
    before = {name: t.clone() for name, t in planted.case.encrypted.state_dict().items()}
    claim = attack.attack(planted.case)
    assert claim.network is None
    assert all(torch.equal(t, before[n]) for n, t in planted.case.encrypted.state_dict().items())
    assert planted.case.meter.samples == 0
