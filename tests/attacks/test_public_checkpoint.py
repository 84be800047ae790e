"""The public network gives away whatever does not come from it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attacks.public_checkpoint import PublicCheckpoint
from deepenc.arena.metrics import checked_scores
from deepenc.errors import ClaimError

BOTH = {"conv1": 1.0, "conv2": 1.0}


def tuned_from(network, size, seed=1):
    """A network that has moved a little from the given one."""
    made, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("allocation", [True, False])
@pytest.mark.parametrize("size", [0.0, 0.2])
def test_what_has_no_partner_is_the_key(plant, trained, allocation, size):
    planted = plant(network=tuned_from(trained, size), public=trained, allocation=allocation)
    scores = PublicCheckpoint().attack(planted.case).scores
    assert planted.auc(scores) == BOTH
    for name, inserted in planted.positions.items():
        assert (scores[name] >= 2).nonzero().flatten().tolist() == list(inserted)
    assert planted.case.meter.samples == 0


def test_a_permuted_and_rescaled_victim_is_no_better_off(plant, trained):
    permuted, order = copy.deepcopy(trained), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    factor = 0.2 + 3 * torch.rand(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor in (permuted.conv1.weight, *permuted.bn1.state_dict().values()):
            if tensor.dim():
                tensor.copy_(tensor[order])
        scale = factor[:, None, None, None]
        permuted.bn1.weight.mul_(factor)
        permuted.bn1.bias.mul_(factor)
        permuted.conv2.weight.copy_(permuted.conv2.weight[:, order] / factor[:, None, None])
        permuted.conv2.weight.mul_(scale)
        permuted.conv2.bias.mul_(factor)
        columns = permuted.linear.weight.view(4, 12, 4)
        columns.div_(factor[:, None])
    inputs = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(permuted(inputs), trained(inputs), atol=1e-4)
    planted = plant(network=permuted, public=trained)
    assert planted.auc(PublicCheckpoint().attack(planted.case).scores) == BOTH


def test_clones_are_told_from_their_models(plant, trained):
    def clones(slot, shape, victim, generator):
        """Rows 2, 3, ... of the victim with 5 % noise, on both sides."""
        index = 2 * slot.block + torch.arange(shape[slot.dim])
        rows = victim.index_select(slot.dim, index)
        return rows + 0.05 * victim.std() * torch.randn(shape, generator=generator)

    network = tuned_from(trained, 0.01)
    for positions in ({"conv1": (1, 4, 9)}, {"conv2": (0, 8)}):
        planted = plant(clones, network=network, public=trained, positions=positions)
        assert set(planted.auc(PublicCheckpoint().attack(planted.case).scores).values()) == {1.0}


def test_another_head_does_not_matter(plant, trained):
    public = copy.deepcopy(trained)
    public.linear = nn.Linear(48, 9)
    planted = plant(public=public)
    assert planted.auc(PublicCheckpoint().attack(planted.case).scores) == BOTH


def test_an_unrelated_public_network_tells_nothing(plant, random_network):
    positions = {"conv1": tuple(range(0, 45, 3)), "conv2": tuple(range(1, 45, 3))}
    network = random_network(40)
    generator, stranger = torch.Generator().manual_seed(9), copy.deepcopy(network)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.copy_(parameter.std() * torch.randn(parameter.shape, generator=generator))
    planted = plant(positions=positions, network=network, width=40, public=stranger)
    scores = PublicCheckpoint().attack(planted.case).scores
    # 15 of 55 channels: the deviation of an AUC is 0.09.
    assert all(0.2 < auc < 0.8 for auc in planted.auc(scores).values())


def test_without_confusion_channels_nothing_stands_out(plant, trained):
    scores = PublicCheckpoint().attack(plant(positions={}, public=trained).case).scores
    assert all(float(score.max()) < 1e-3 for score in scores.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(plant, trained, dtype):
    planted = plant(public=trained)
    planted.case.encrypted.to(dtype)
    scores = PublicCheckpoint().attack(planted.case).scores
    checked_scores(scores, planted.case.sites, "test")
    assert planted.auc(scores) == pytest.approx(BOTH)


def test_another_architecture_is_refused(plant):
    with pytest.raises(ClaimError, match="the network that the victim was fine-tuned from"):
        PublicCheckpoint().attack(plant(public=nn.Linear(3, 3)).case)


def test_needs_the_public_network(plant):
    assert PublicCheckpoint().needs.missing(plant().case.threat) == ["public_checkpoint"]
    with pytest.raises(ClaimError, match="public_checkpoint: true"):
        PublicCheckpoint().attack(plant().case)
