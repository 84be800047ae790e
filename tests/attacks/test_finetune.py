"""Fine-tuning's options, and what the arena is told when training diverges."""

from __future__ import annotations

import pytest
import torch

from attacks.finetune import Finetune
from attacks.prune import Prune
from attacks.scratch import Scratch
from deepenc.arena.kit.training import portion, train
from deepenc.errors import ClaimError, OutOfBudget
from deepenc.network.sites import Role
from deepenc.tasks.examples import Examples
from deepenc.victims.recipe import Recipe

HEAD = {"linear.weight", "linear.bias"}
NORMS = {"bn1.weight", "bn1.bias"}
STATISTICS = {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}


def changed(network, case):
    before = case.encrypted.state_dict()
    return {name for name, t in network.state_dict().items() if not torch.equal(t, before[name])}


def claimed(case, **fields):
    return Finetune(steps=4, lr=0.05, **fields).attack(case).network


@pytest.mark.parametrize(("layers", "expected"), [("head", HEAD), ("norms", NORMS)])
def test_only_the_chosen_layers_change(plant, layers, expected):
    case = plant(labelled=40).case
    assert changed(claimed(case, layers=layers), case) == expected | STATISTICS
    assert changed(claimed(case, layers=layers, freeze_norms=True), case) == expected


def test_a_network_without_norms_is_claimed_as_it_is(plant):
    case = plant(labelled=40).case
    case.encrypted.bn1 = torch.nn.Identity()
    assert not changed(claimed(case, layers="norms"), case)
    assert case.meter.samples == 0


def test_a_network_without_a_head(plant):
    case = plant(labelled=40).case
    case.encrypted.linear.out_features = 5
    with pytest.raises(ClaimError, match="no last layer of Toy is known"):
        claimed(case, layers="head")
    with pytest.raises(ClaimError, match="fresh_head"):
        claimed(case, fresh_head=True)


def test_a_fresh_head_owes_nothing_to_the_old_one(plant):
    heads = []
    for factor in (1.0, 5.0):
        case = plant(labelled=40).case
        with torch.no_grad():
            case.encrypted.linear.weight.mul_(factor)
            case.encrypted.linear.bias.add_(factor)
        torch.manual_seed(int(factor))
        before = torch.get_rng_state()
        heads.append(claimed(case, layers="head", fresh_head=True, freeze_norms=True).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in HEAD)


def test_early_layers_learn_slowly_where_asked(plant):
    case = plant(labelled=40).case

    def moved(**fields):
        network, before = claimed(case, **fields).state_dict(), case.encrypted.state_dict()
        return [float((network[f"{n}.weight"] - before[f"{n}.weight"]).norm()) for n in ("conv1", "linear")]

    (early, late), (slowed, same) = moved(), moved(decay=0.01)
    assert slowed < 0.01 * early and same > 0.5 * late


def test_recalibration_comes_first(plant):
    case = plant(labelled=20, unlabelled=10).case
    network = claimed(case, recalibrate=25, layers="head", freeze_norms=True)
    assert case.meter.samples == 25 + 4 * 20
    inputs = torch.cat([case.unlabelled.inputs, case.labelled.inputs])[:25]
    maps = case.encrypted.conv1(inputs)
    assert torch.allclose(network.bn1.running_mean, maps.mean((0, 2, 3)), atol=1e-5)


def unused(slot, shape, victim, generator):
    """Confusion channels as the real ones are, but for small factors; small outgoing ones without norm."""
    values = victim.mean() + victim.std() * torch.randn(shape, generator=generator)
    if slot.role is Role.SCALE or slot.tensor == "linear.weight":
        return 1e-3 * values
    return values.abs() if slot.role is Role.VARIANCE else values


def test_prune_suspects_what_is_hardly_used(plant):
    planted = plant(unused)
    scores = Prune().attack(planted.case).scores
    assert planted.auc(scores) == {"conv1": 1.0, "conv2": 1.0}
    assert all(s.dtype == torch.float64 and torch.isfinite(s).all() for s in scores.values())
    factors = planted.case.encrypted.bn1.weight.double().abs()
    assert torch.allclose(scores["conv1"], -factors / factors.mean())


def test_l1_leaves_few_channels_that_matter(plant):
    """The task needs three channels or four: the others' factors fall to 0, and half can be removed."""
    planted = plant(unused, labelled=200)
    plain, sparse = (Finetune(steps=60, lr=0.05, l1=l1).attack(planted.case).network for l1 in (0.0, 0.1))
    assert sparse.bn1.weight.abs().sum() < 0.2 * plain.bn1.weight.abs().sum()
    case = planted.case.with_network(sparse)
    order = Prune().attack(case).scores["conv1"].argsort(descending=True)
    assert planted.accuracy(case.remove({"conv1": tuple(sorted(order[:8].tolist()))})) > 0.9


def test_prune_is_finite_where_all_is_zero(plant):
    case = plant().case
    with torch.no_grad():
        for tensor in case.encrypted.parameters():
            tensor.zero_()
    assert all(torch.equal(s, torch.zeros_like(s)) for s in Prune().attack(case).scores.values())


@pytest.mark.parametrize("attack", [Finetune(steps=30, lr=1e30), Scratch(steps=30, lr=1e30)])
def test_divergence_is_told(plant, attack):
    case = plant(labelled=40).case
    claim = attack.attack(case)
    assert claim.diverged
    assert all(torch.isfinite(t).all() for t in claim.network.state_dict().values())
    healthy = plant(labelled=40).case
    assert not Finetune(steps=3).attack(healthy).diverged


@pytest.mark.parametrize("budget", [{"steps": 0}, {"samples": 0}, {"samples": 39}])
def test_nothing_is_broken_that_cannot_be_repaired(plant, budget):
    case = plant(labelled=40, **budget).case
    assert not changed(claimed(case, fresh_head=True), case)


def test_options_reach_the_training(plant):
    case = plant(labelled=40).case
    options = [
        {},
        {"flip": True},
        {"crop": 0.3},
        {"shift": 0.2},
        {"label_smoothing": 0.2},
        {"mixed": True},
        {"l1": 0.1},
        {"decay": 0.5},
        {"weight_decay": 0.1},
    ]
    networks = [claimed(case, **option).state_dict() for option in options]
    found = [torch.cat([tensor.flatten() for tensor in network.values()]) for network in networks]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_one_class_among_the_labels(plant):
    case = plant(labelled=40).case
    case.labelled.targets[:] = 2
    assert torch.isfinite(claimed(case).linear.weight).all()


def test_train_takes_other_images_with_probabilities(plant):
    case = plant(unlabelled=20).case
    images = Examples(case.unlabelled.inputs, torch.full((20, 4), 0.25))
    train(case, case.copy(), Recipe(steps=3), examples=images)
    assert case.meter.samples == 60


def test_a_portion_of_what_is_left(plant):
    case = plant(steps=10, samples=100).case
    case.meter.charge(steps=2, samples=20)
    with portion(case, 4, reserve=8) as part:
        assert (part.meter.left("steps"), part.meter.left("samples")) == (2, 18)
        with pytest.raises(OutOfBudget):
            part.meter.charge(samples=19)
        part.meter.charge(samples=18)
    assert (case.meter.left("steps"), case.meter.left("samples")) == (8, 62)
    unlimited = plant().case
    with portion(unlimited, 4) as part:
        assert part.meter.left("steps") is None


def test_needs():
    assert Finetune().needs.labelled == 2 and Prune().needs.labelled == 0
