"""Attacks that hand back a network: planted damage that they undo, budgets that they keep to."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from attacks.finetune import Finetune
from attacks.null import Null
from attacks.recalibrate import Recalibrate
from attacks.scratch import Scratch
from deepenc.errors import OutOfBudget
from deepenc.network.sites import Role
from tests.attacks.fills import oversized

ATTACKS = [Null(), Scratch(steps=5), Recalibrate(images=8), Finetune(steps=5)]


def ids(attack):
    return attack.name


def shifted_statistics(slot, shape, victim, generator):
    """Confusion channels that are harmless but for their running statistics."""
    if slot.role is Role.MEAN:
        return torch.full(shape, -100.0)
    if slot.role is Role.VARIANCE:
        return torch.full(shape, 1e-2)
    if slot.role is Role.OUTGOING:
        return 0.02 * torch.randn(shape, generator=generator)
    return torch.ones(shape)


def test_null_claims_the_encrypted_network_itself(plant):
    case = plant().case
    claim = Null().attack(case)
    assert claim.network is case.encrypted and claim.scores is None


def test_recalibrate_undoes_wrong_statistics(plant):
    planted = plant(shifted_statistics, unlabelled=32)
    assert planted.accuracy(planted.original) > 0.95
    assert planted.accuracy(planted.case.encrypted) < 0.4
    assert planted.accuracy(Recalibrate().attack(planted.case).network) > 0.9


def test_recalibrate_sets_the_statistics_of_its_images(plant):
    planted = plant(unlabelled=40)
    case = planted.case
    network = Recalibrate(images=32).attack(case).network
    assert case.meter.samples == 32
    maps = network.conv1(case.unlabelled[:32].inputs).detach().double()
    assert torch.allclose(network.bn1.running_mean.double(), maps.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(network.bn1.running_var.double(), maps.var((0, 2, 3)), atol=1e-5)
    assert network.bn1.momentum == case.encrypted.bn1.momentum == 0.1


def test_recalibrate_averages_over_chunks(plant):
    case = plant(unlabelled=129).case  # chunks of at most 64: three of 43
    network = Recalibrate(images=129).attack(case).network
    means = [network.conv1(case.unlabelled[a : a + 43].inputs).mean((0, 2, 3)) for a in (0, 43, 86)]
    assert torch.allclose(network.bn1.running_mean, torch.stack(means).mean(0), atol=1e-5)


def test_recalibrate_without_batch_norm_claims_an_equal_network(plant):
    planted = plant(unlabelled=32)
    assert Recalibrate().pointless(planted.case) is None
    planted.case.encrypted.bn1 = nn.Identity()
    assert "no BatchNorm" in Recalibrate().pointless(planted.case)
    claimed = Recalibrate().attack(planted.case).network
    assert planted.case.meter.samples == 0
    expected = planted.case.encrypted.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in claimed.state_dict().items())


def test_finetune_repairs(plant):
    planted = plant(oversized, labelled=200)
    assert planted.accuracy(planted.case.encrypted) < 0.7
    assert planted.accuracy(Finetune(epochs=8).attack(planted.case).network) > 0.9


def test_finetune_does_not_lose_a_clean_network_and_more_steps_gain_more(plant):
    planted = plant(oversized, labelled=200)
    clean = plant(positions={}, labelled=200)
    assert clean.accuracy(Finetune(steps=20, lr=0.01).attack(clean.case).network) > 0.95
    few, many = (planted.accuracy(Finetune(steps=n).attack(planted.case).network) for n in (1, 60))
    assert few < many > 0.9


def test_finetune_default_is_the_papers_recipe(plant):
    case = plant(labelled=130).case
    Finetune().attack(case)
    # 15 epochs of two full batches of 64; the last two images of each epoch are left out.
    assert case.meter.samples == 15 * 128


def test_scratch_learns_from_the_labels_alone(plant):
    planted = plant(oversized, labelled=200)
    assert planted.accuracy(Scratch(steps=100).attack(planted.case).network) > 0.9


def test_scratch_uses_no_stolen_weights(plant):
    planted = plant(labelled=50)
    first = Scratch(steps=10).attack(planted.case).network.state_dict()
    with torch.no_grad():
        for tensor in planted.case.encrypted.parameters():
            tensor.fill_(7.0)
    second = Scratch(steps=10).attack(planted.case).network.state_dict()
    assert all(torch.equal(t, second[n]) for n, t in first.items())


def test_scratch_without_labels_is_the_fresh_network(plant):
    case = plant().case
    fresh = case.blank(case.seed).state_dict()
    claimed = Scratch().attack(case).network
    assert not claimed.training and case.meter.samples == 0
    assert all(torch.equal(t, fresh[n]) for n, t in claimed.state_dict().items())


@pytest.mark.parametrize("attack", [Scratch(steps=50), Finetune(steps=50)], ids=ids)
@pytest.mark.parametrize(("budget", "spent"), [({"steps": 3}, 96), ({"samples": 100}, 96)])
def test_training_keeps_to_its_budget(plant, attack, budget, spent):
    case = plant(labelled=32, **budget).case
    with case.meter.running():
        claim = attack.attack(case)
    assert (case.meter.steps, case.meter.samples) == (3, spent)
    assert not claim.network.training


@pytest.mark.parametrize("attack", [Scratch(steps=50), Finetune(steps=50)], ids=ids)
def test_no_budget_leaves_the_network_as_it_was(plant, attack):
    case = plant(labelled=32, steps=0).case
    start = case.encrypted if attack.reference is None else case.blank(case.seed)
    claimed = attack.attack(case).network.state_dict()
    assert all(torch.equal(t, start.state_dict()[n]) for n, t in claimed.items())


def test_recalibrate_over_its_budget_is_stopped(plant):
    with pytest.raises(OutOfBudget, match="31 samples"):
        Recalibrate().attack(plant(unlabelled=32, samples=31).case)


@pytest.mark.parametrize("attack", ATTACKS, ids=ids)
def test_nothing_outside_is_touched_and_all_is_repeatable(plant, attack):
    planted = plant(labelled=20, unlabelled=8)
    before = {name: t.clone() for name, t in planted.case.encrypted.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = attack.attack(planted.case).network
        assert not torch.is_grad_enabled()
    assert not caught
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in planted.case.encrypted.state_dict().items())
    assert not first.training and all(p.requires_grad for p in first.parameters())
    torch.manual_seed(2)
    second = attack.attack(planted.case).network.state_dict()
    assert all(torch.equal(t, second[n]) for n, t in first.state_dict().items())


@pytest.mark.parametrize("attack", [Scratch(steps=5), Finetune(steps=5)], ids=ids)
def test_another_seed_is_another_network(plant, attack):
    one, two = (attack.attack(plant(labelled=100, seed=s).case).network.state_dict() for s in (5, 6))
    assert any(not torch.equal(t, two[n]) for n, t in one.items())


def test_needs_are_declared():
    assert not Null().needs.model_fields_set
    assert Scratch().needs.architecture and Scratch().needs.labelled == 0
    assert Recalibrate(images=50).needs.unlabelled == 50
    assert Finetune().needs.labelled == 2


@pytest.mark.parametrize("labels", [2, 3])
def test_two_labelled_images_are_enough(plant, labels):
    planted = plant(labelled=labels)
    network = Finetune(epochs=2, batch_size=2).attack(planted.case).network
    assert all(torch.isfinite(t).all() for t in network.state_dict().values())
