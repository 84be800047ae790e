"""What several releases share is real; the rest is the key."""

from __future__ import annotations

import copy

import pytest
import torch

from attacks.releases import Releases
from deepenc.arena.case import Release
from deepenc.arena.metrics import checked_scores
from deepenc.errors import ClaimError

BOTH = {"conv1": 1.0, "conv2": 1.0}
OTHER = {"conv1": (0, 7, 11), "conv2": (3, 6)}
THIRD = {"conv1": (2, 4, 14), "conv2": (8, 13)}


def release(plant, positions, seed, network=None):
    case = plant(positions=positions, seed=seed, network=network).case
    return Release(case.encrypted, case.sites, None)


def drifted(network, size):
    made, generator = copy.deepcopy(network), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("allocation", [True, False])
def test_a_second_release_gives_the_key(plant, allocation):
    planted = plant(releases=(release(plant, OTHER, 6),), allocation=allocation)
    scores = Releases().attack(planted.case).scores
    assert planted.auc(scores) == BOTH
    for name, inserted in planted.positions.items():
        real = [c for c in range(len(scores[name])) if c not in inserted]
        assert scores[name][real].max() < 1e-3  # equal bit for bit, but for the factors between layers
    assert planted.case.meter.samples == 0


def test_positions_that_stayed_the_same_are_found_too(plant):
    planted = plant(releases=(release(plant, {"conv1": (1, 4, 9), "conv2": (0, 8)}, 6),))
    assert planted.auc(Releases().attack(planted.case).scores) == BOTH


def test_fine_tuning_in_between_does_not_hide_them(plant, trained):
    planted = plant(releases=(release(plant, OTHER, 6, drifted(trained, 0.1)),))
    assert planted.auc(Releases().attack(planted.case).scores) == BOTH


def test_releases_are_averaged_and_their_number_can_be_limited(plant, trained):
    others = (release(plant, OTHER, 6, drifted(trained, 0.3)), release(plant, THIRD, 7))
    case = plant(releases=others).case
    each = [Releases().attack(plant(releases=(one,)).case).scores for one in others]
    together = Releases().attack(case).scores
    for name, score in together.items():
        assert torch.allclose(score, (each[0][name] + each[1][name]) / 2)
        assert torch.equal(Releases(releases=1).attack(case).scores[name], each[0][name])


def test_an_independent_network_tells_nothing(plant, random_network):
    positions = {"conv1": tuple(range(0, 45, 3)), "conv2": tuple(range(1, 45, 3))}
    network = random_network(40)
    stranger = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    other = plant(positions=positions, network=stranger, width=40, seed=6).case
    planted = plant(
        positions=positions,
        network=network,
        width=40,
        releases=(Release(other.encrypted, other.sites, None),),
    )
    # 15 of 55 channels: the deviation of an AUC is 0.09.
    assert all(0.2 < auc < 0.8 for auc in planted.auc(Releases().attack(planted.case).scores).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(plant, dtype):
    other = release(plant, OTHER, 6)
    other.encrypted.to(dtype)
    planted = plant(releases=(other,))
    planted.case.encrypted.to(dtype)
    scores = Releases().attack(planted.case).scores
    checked_scores(scores, planted.case.sites, "test")
    assert planted.auc(scores) == BOTH


def test_the_case_is_left_alone(plant):
    other = release(plant, OTHER, 6)
    planted = plant(releases=(other,))
    before = [
        {n: t.clone() for n, t in m.state_dict().items()} for m in (planted.case.encrypted, other.encrypted)
    ]
    first, second = (Releases().attack(planted.case).scores for _ in range(2))
    assert all(torch.equal(score, second[name]) for name, score in first.items())
    for kept, network in zip(before, (planted.case.encrypted, other.encrypted), strict=True):
        assert all(torch.equal(t, kept[n]) for n, t in network.state_dict().items())


def test_needs_a_release(plant):
    assert Releases().needs.releases == 1 and Releases(releases=3).needs.releases == 3
    assert Releases().needs.missing(plant().case.threat)
    with pytest.raises(ClaimError, match="releases: 1"):
        Releases().attack(plant().case)
