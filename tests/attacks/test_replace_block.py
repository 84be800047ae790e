"""Replacing a site: nothing of it is left, all else is, and the network works again."""

from __future__ import annotations

import pytest
import torch

from attacks.replace_block import ReplaceBlock
from deepenc.errors import ConfigError
from deepenc.network.sites import Role

FIRST = {"conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv2.weight"}


def ruinous(slot, shape, victim, generator):
    """Weights thirty times as large as the victim's."""
    values = 30 * victim.std() * torch.randn(shape, generator=generator)
    return values.abs() + 0.1 if slot.role is Role.VARIANCE else values


ONLY_FIRST = {"conv1": (1, 4, 9, 11), "conv2": ()}


def frozen(case, **fields):
    """The network as training starts from it: the steps are too small to move anything."""
    tiny = {"lr": 1e-300, "final_lr": 0.0, "weight_decay": 0.0, "steps": 1, "warm": 0}
    return ReplaceBlock(**tiny | fields).attack(case).network


def new(tensor, old):
    """Whether no entries are the old ones, but for a chance equality of two floats."""
    return torch.isin(tensor, old).float().mean() < 0.01


def test_confusion_in_the_first_site_alone_is_thrown_away(plant):
    planted = plant(ruinous, positions=ONLY_FIRST, labelled=200)
    assert planted.accuracy(planted.case.encrypted) < 0.7
    network = ReplaceBlock(epochs=8).attack(planted.case).network
    assert planted.accuracy(network) > 0.9
    assert network.conv1.weight.shape == planted.original.conv1.weight.shape


def test_nothing_of_the_site_is_left_and_all_else_is(plant):
    planted = plant(positions=ONLY_FIRST, labelled=20)
    network, original = frozen(planted.case).state_dict(), planted.original.state_dict()
    for name in ("conv2.bias", "linear.weight", "linear.bias"):
        assert torch.equal(network[name], original[name])
    for name in ("conv1.weight", "conv2.weight"):
        assert new(network[name], original[name])
        # As torch initialises: uniform, up to 1 / sqrt(fan in).
        bound = network[name][0].numel() ** -0.5
        assert 0.9 * bound < network[name].abs().max() <= bound
    assert torch.equal(network["bn1.weight"], torch.ones(12))
    assert torch.equal(network["bn1.bias"], torch.zeros(12))


def test_without_the_configuration_the_width_stays(plant):
    planted = plant(positions=ONLY_FIRST, labelled=20, allocation=False)
    network, encrypted = frozen(planted.case).state_dict(), planted.case.encrypted.state_dict()
    assert all(network[name].shape == tensor.shape for name, tensor in encrypted.items())
    assert new(network["conv2.weight"], encrypted["conv2.weight"])
    assert torch.equal(network["linear.weight"], encrypted["linear.weight"])


def test_sites_by_number_and_by_name(plant):
    case = plant(labelled=20).case
    before = case.encrypted.state_dict()

    def untouched(**fields):
        network = frozen(case, **fields).state_dict()
        return {n for n, t in network.items() if t.shape == before[n].shape and torch.equal(t, before[n])}

    # The other site keeps its confusion channels.
    assert untouched() >= {"linear.weight", "linear.bias", "conv2.bias"}
    assert untouched(sites=("conv2",)) >= FIRST - {"conv2.weight", "bn1.running_mean", "bn1.running_var"}
    assert untouched(sites="conv2") == untouched(sites=["conv2"])
    assert (
        untouched(sites=2)
        == untouched(sites="*")
        == {"linear.bias"} | (untouched(sites=2) & {"bn1.num_batches_tracked"})
    )
    with pytest.raises(ConfigError, match="conv3"):
        frozen(case, sites="conv3")


def test_a_linear_site_with_blocks_and_without_norm(plant):
    case = plant(labelled=20).case
    network, before = frozen(case, sites="conv2"), case.encrypted.state_dict()
    assert network.conv2.weight.shape[0] == 12 and network.linear.weight.shape[1] == 48
    assert new(network.linear.weight, before["linear.weight"])
    assert torch.equal(network.linear.bias, before["linear.bias"])


def test_warming_trains_the_new_part_alone(plant):
    case = plant(positions=ONLY_FIRST, labelled=20).case
    with case.meter.running():
        network = ReplaceBlock(warm=5, steps=1, lr=0.1, final_lr=0.0).attack(case).network
    assert case.meter.steps == 6
    start, only = frozen(case), plant(positions=ONLY_FIRST, labelled=20, steps=5).case
    with only.meter.running():
        warmed = ReplaceBlock(warm=5, lr=0.1, final_lr=0.0).attack(only).network
    for name in ("linear.weight", "linear.bias", "conv2.bias"):
        assert torch.equal(warmed.state_dict()[name], start.state_dict()[name])
        assert not torch.equal(network.state_dict()[name], start.state_dict()[name])
    assert not torch.equal(warmed.conv1.weight, start.conv1.weight)


@pytest.mark.parametrize("budget", [{"steps": 0}, {"samples": 19}])
def test_without_a_budget_nothing_is_thrown_away(plant, budget):
    case = plant(labelled=20, **budget).case
    network, before = ReplaceBlock().attack(case).network.state_dict(), case.encrypted.state_dict()
    assert all(torch.equal(network[name], tensor) for name, tensor in before.items())


def test_repeatable_and_nothing_outside_is_touched(plant):
    case = plant(labelled=20).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    one = ReplaceBlock(steps=3, warm=2).attack(case).network.state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    two = ReplaceBlock(steps=3, warm=2).attack(case).network.state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in case.encrypted.state_dict().items())
    other = ReplaceBlock(steps=3, warm=2).attack(plant(labelled=20, seed=6).case).network
    assert not torch.equal(one["conv1.weight"], other.conv1.weight)


def test_no_sites_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ReplaceBlock(sites=0)
