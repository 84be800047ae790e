"""Statistics of activations: against a network's own BatchNorm in training, and by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepenc.analysis.activations import observe
from deepenc.analysis.batchnorm import Moments, distance, norm_moments, pooled
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot


class Net(nn.Module):
    """Two normalised convolutions and a classifier on a flattened 2x2 map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 5, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Net().eval()
    for norm in (network.bn1, network.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return network


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_moments_are_those_of_what_each_layer_gets(network):
    inputs = images(150)  # three chunks
    found = norm_moments(network, inputs)
    with torch.no_grad():
        first = network.conv1(inputs)
        second = network.conv2(torch.relu(network.bn1(first)))
    for name, values in {"bn1": first, "bn2": second}.items():
        assert torch.allclose(found[name].mean.float(), values.mean((0, 2, 3)), atol=1e-5)
        expected = values.var((0, 2, 3), correction=0)
        assert torch.allclose(found[name].variance.float(), expected, rtol=1e-4)


def test_live_moments_are_those_of_training(network):
    inputs = images(40)
    trained = copy.deepcopy(network).train()
    for norm in (trained.bn1, trained.bn2):
        norm.momentum = 1.0
    trained(inputs)
    found = norm_moments(network, inputs, live=True)
    assert torch.allclose(found["bn2"].mean.float(), trained.bn2.running_mean, atol=1e-5)
    # Training keeps the unbiased variance.
    unbiased = found["bn2"].variance * (40 * 36) / (40 * 36 - 1)
    assert torch.allclose(unbiased.float(), trained.bn2.running_var, rtol=1e-4)
    assert not torch.allclose(norm_moments(network, inputs)["bn2"].mean, found["bn2"].mean, atol=1e-2)


@pytest.mark.parametrize("live", [False, True])
def test_the_network_stays_as_it_is(network, live):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    norm_moments(network, images(8), live=live)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert network.bn1.track_running_stats and not network.bn1._forward_pre_hooks


def test_hooks_go_where_the_network_fails(network):
    with pytest.raises(RuntimeError):
        norm_moments(network, torch.zeros(3, 7, 6, 6))
    assert not network.bn1._forward_pre_hooks


def test_pooled_moments_are_those_of_all():
    values = torch.randn(9, 3, 2, dtype=torch.float64)
    parts = [(Moments.of(values[:4]), 8), (Moments.of(values[4:]), 10)]
    whole, found = Moments.of(values), pooled(parts)
    assert torch.allclose(found.mean, whole.mean) and torch.allclose(found.variance, whole.variance)


def test_distance_by_hand():
    stored = Moments(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([4.0, 1.0, 0.0]))
    measured = Moments(torch.tensor([3.0, 0.0, 2.0]), torch.tensor([4.0, torch.e**2, 0.0]))
    # Half of a squared deviation of 2 in units of 2; a deviation of e for 1; nothing.
    assert distance(measured, stored, 0.0)[:2].tolist() == pytest.approx([1.0, 1.0], rel=1e-6)
    assert distance(measured, stored, 1e-5)[2] == 0


def test_channels_are_seen_as_their_consumers_see_them(network):
    seen = {}
    observe(
        network,
        find_sites(network, images(1)),
        images(3),
        lambda site, values: seen.update({site.name: values}),
    )
    with torch.no_grad():
        first = torch.relu(network.bn1(network.conv1(images(3))))
        second = torch.relu(network.bn2(network.conv2(first)))
        second = nn.functional.adaptive_avg_pool2d(second, 2)
    assert torch.allclose(seen["conv1"], first.flatten(2), atol=1e-6)
    assert torch.allclose(seen["conv2"], second.flatten(2), atol=1e-6)  # blocks of four


def test_a_channel_without_a_plain_consumer_is_seen_at_its_producer(network):
    slots = (
        Slot("conv1.weight", 0, Role.INCOMING),
        Slot("bn1.weight", 0, Role.SCALE),
        Slot("nowhere", 0, Role.OUTGOING),
    )
    seen = []
    observe(network, [Site("conv1", 5, slots)], images(3), lambda site, values: seen.append(values))
    with torch.no_grad():
        assert torch.allclose(seen[0], network.bn1(network.conv1(images(3))).flatten(2), atol=1e-6)


def test_tokens_and_windows_of_an_image_are_its_positions():
    linear = nn.Linear(4, 2)
    site = Site("x", 4, (Slot("0.weight", 1, Role.OUTGOING),))

    class Windows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 3, 4)  # two windows of three tokens

    seen = []
    network = nn.Sequential(linear)
    tokens = torch.randn(5, 6, 4)
    observe(network, [site], tokens, lambda _, values: seen.append(values))
    assert torch.equal(seen[0], tokens.transpose(1, 2))
    network = nn.Sequential(linear, nn.Identity())
    network.register_forward_pre_hook(lambda _, given: (Windows()(given[0]),))
    observe(network, [site], tokens, lambda _, values: seen.append(values))
    assert torch.equal(seen[1], tokens.transpose(1, 2))
