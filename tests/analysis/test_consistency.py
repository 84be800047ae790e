"""Verifying a site's key: every answer against the network itself, with the channels really zeroed."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.analysis import consistency, readers
from deepenc.analysis.batchnorm import Moments, batchnorms, distance, norm_moments, stored
from deepenc.analysis.consistency import decode, evidence_of, verify
from deepenc.errors import SiteError
from deepenc.network.find import find_sites
from deepenc.network.gates import gated_tensors
from deepenc.network.sites import Role, Site
from deepenc.network.structure import named_tensors, replace_tensors


class Dense(nn.Module):
    """A layer that concatenates, in-place activations, and a BatchNorm of more than one layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(2 + 6, 5, 3, stride=2, padding=1)
        self.side = nn.Conv2d(2 + 6, 3, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 4, 3, dilation=2, padding="same", padding_mode="reflect")
        self.norm3 = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4 * 9, 7)
        self.norm4 = nn.BatchNorm1d(7)
        self.fc2 = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, nn.functional.relu(self.conv1(x))], 1)
        x = torch.cat([self.conv2(x), self.side(x)], 1)
        x = nn.functional.relu(self.norm(x), inplace=True)
        x = nn.functional.relu(self.norm3(self.conv3(x)), inplace=True)
        return self.fc2(torch.relu(self.norm4(self.fc1(x.flatten(1)))))


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network = Dense().eval()
    for norm in batchnorms(network).values():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return network


@pytest.fixture(scope="module")
def sites(network, inputs) -> dict[str, Site]:
    return {site.name: site for site in find_sites(network, inputs[:1])}


def slow(network, site, kept, inputs, *, own):
    """The loss of a guess, measured on the network with the other channels zeroed."""
    tensors = named_tensors(network)
    changed = gated_tensors(tensors, [site], {site.name: kept})
    measured = norm_moments(replace_tensors(network, {**tensors, **changed}), inputs)
    behind = {"conv1": ["norm"], "conv2": ["norm3"], "side": ["norm3"], "conv3": ["norm4"]}[site.name]
    layers = batchnorms(network)
    rows = torch.cat([distance(measured[n], stored(layers[n]), layers[n].eps) for n in behind])
    cost = rows.log1p().sum()
    for slot in site.slots:
        if slot.role is Role.MEAN and own:
            name = slot.tensor.removesuffix(".running_mean")
            far = distance(measured[name], stored(layers[name]), layers[name].eps).log1p()
            cost += own * (far[slot.start : slot.start + site.width] * kept).sum()
    return float(cost / len(rows))


def masks(width, count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, width, generator=generator) > 0.4


@pytest.mark.parametrize("own", [0.0, 0.7])
@pytest.mark.parametrize("name", ["conv1", "conv2", "side", "conv3"])
def test_losses_are_those_of_the_network_itself(network, inputs, sites, name, own):
    site = sites[name]
    evidence = evidence_of(network, site, inputs, own=own)
    kept = masks(site.width, 5, 2)
    expected = [slow(network, site, row, inputs, own=own) for row in kept]
    assert evidence.losses(kept).tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("entries", [1, 200, 5000])
def test_chunks_change_nothing(network, inputs, sites, entries, monkeypatch):
    kept = masks(4, 9, 3)
    whole = evidence_of(network, sites["conv3"], inputs).losses(kept)
    monkeypatch.setattr(readers, "ENTRIES", entries)
    monkeypatch.setattr(consistency, "ENTRIES", entries)
    parts = evidence_of(network, sites["conv3"], inputs).losses(kept)
    assert torch.allclose(parts, whole, rtol=1e-5)


def test_of_too_many_rows_some_are_used(network, inputs, sites, monkeypatch):
    monkeypatch.setattr(consistency, "SECONDS", 3 * 25)
    evidence = evidence_of(network, sites["conv3"], inputs)
    assert evidence.second.shape == (3, 5, 5)
    bias = network.fc1.bias.detach().double()
    assert torch.equal(evidence.bias, bias[[0, 2, 4]])


def test_flips_and_swaps_are_the_losses_of_changed_guesses(network, inputs, sites):
    evidence = evidence_of(network, sites["conv1"], inputs)
    kept = torch.tensor([True, False, True, True, False, True])
    flipped = kept ^ torch.eye(6, dtype=torch.bool)
    assert torch.allclose(evidence.flips(kept), evidence.losses(flipped))
    found = evidence.swaps(kept)
    assert found.shape == (2, 4)
    for (row, back), (column, gone) in itertools.product(enumerate((1, 4)), enumerate((0, 2, 3, 5))):
        other = kept.clone()
        other[back], other[gone] = True, False
        assert float(found[row, column]) == pytest.approx(evidence.loss(other), rel=1e-9)
    assert evidence.swaps(torch.ones(6, dtype=torch.bool)).shape == (0, 6)


@pytest.mark.parametrize("guesses", [2, 4096])
def test_best_is_the_least_of_all(network, inputs, sites, guesses, monkeypatch):
    monkeypatch.setattr(consistency, "GUESSES", guesses)
    evidence = evidence_of(network, sites["conv1"], inputs)
    every = [
        torch.tensor([c not in chosen for c in range(6)]) for chosen in itertools.combinations(range(6), 2)
    ]
    losses = evidence.losses(torch.stack(every))
    assert torch.equal(evidence.best(2), every[int(losses.argmin())])
    assert evidence.best(0).all()


def test_readers_are_found_by_values(network, inputs, sites):
    found = readers.readers(network, list(sites.values()), inputs[:2])
    places = {name: [(r.consumer, r.norm, r.first) for r in group] for name, group in found.items()}
    assert places == {
        "conv1": [("conv2", "norm", 0), ("side", "norm", 5)],
        "conv2": [("conv3", "norm3", 0)],
        "side": [("conv3", "norm3", 0)],
        "conv3": [("fc1", "norm4", 0)],
    }  # behind fc1 comes no BatchNorm


def test_later_sites_are_judged_without_what_is_removed(network, inputs, sites):
    order, heard = [], {}

    def solve(site, evidence):
        order.append(site.name)
        heard[site.name] = evidence
        return {"conv1": [4, 2], "conv2": [0]}.get(site.name, [])

    gone = decode(network, list(sites.values()), inputs, solve)
    assert order == ["conv1", "conv2", "side", "conv3", "fc1"]
    assert gone["conv1"] == (2, 4) and gone["conv2"] == (0,)
    tensors = named_tensors(network)
    gates = {"conv1": torch.tensor([1.0, 1, 0, 1, 0, 1]), "conv2": torch.tensor([0.0, 1, 1, 1, 1])}
    changed = gated_tensors(tensors, list(sites.values()), gates)
    clean = evidence_of(replace_tensors(network, {**tensors, **changed}), sites["conv3"], inputs)
    assert torch.allclose(heard["conv3"].first, clean.first, atol=1e-6)
    assert torch.allclose(heard["conv3"].own, clean.own, atol=1e-5)


def test_without_rows_behind_the_own_statistics_decide(network, inputs, sites):
    evidence = evidence_of(network, sites["fc1"], inputs, own=0.0)
    assert len(evidence.bias) == 0
    norm = network.norm4
    far = distance(norm_moments(network, inputs)["norm4"], stored(norm), norm.eps).log1p()
    kept = masks(7, 1, 4)[0]
    assert evidence.loss(kept) == pytest.approx(float(far[kept].sum()), rel=1e-4)


def test_a_site_without_any_batch_norm_cannot_be_verified(inputs):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    (site,) = find_sites(network, inputs[:1])
    with pytest.raises(SiteError, match="cannot be checked"):
        verify(network, site, [0], inputs)
    assert decode(network, [site], inputs, lambda *_: [0]) == {}


def test_verify_is_least_for_the_victims_own_channels(inputs):
    """Real statistics, three confusion channels: no other of 3,000 keys is as plausible."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(2, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 12, 3), nn.BatchNorm2d(12)
    ).eval()
    key = [3, 11, 17]
    clean = copy.deepcopy(network)
    with torch.no_grad():
        clean[3].weight[:, key] = 0
    measured = norm_moments(clean, inputs)
    for name, moments in measured.items():
        network[int(name)].running_mean.copy_(moments.mean)
        network[int(name)].running_var.copy_(moments.variance)
    clean[1].load_state_dict(network[1].state_dict())
    moments = norm_moments(clean, inputs)["4"]  # the first BatchNorm has changed
    network[4].running_mean.copy_(moments.mean)
    network[4].running_var.copy_(moments.variance)
    site = next(s for s in find_sites(network, inputs[:1]) if s.name == "0")
    assert verify(network, site, key, inputs) == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    evidence = evidence_of(network, site, inputs)
    others = torch.ones(3000, 24, dtype=torch.bool)
    for row in others:
        row[rng.choice(24, 3, replace=False)] = False
    losses = evidence.losses(others[~(~others[:, key]).all(1)])
    assert float(losses.min()) > 1e-3
    assert (~evidence.best(3)).nonzero().flatten().tolist() == key


def test_the_network_stays_as_it_is(network, inputs, sites):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    decode(network, list(sites.values()), inputs, lambda site, _: [0])
    with pytest.raises(ZeroDivisionError):
        decode(network, list(sites.values()), inputs, lambda *_: 1 / 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_grouped_and_transposed_consumers_are_left_alone(inputs):
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.Conv2d(5, 2, 1),
    ).eval()
    sites = find_sites(network, inputs[:1])
    found = readers.readers(network, sites, inputs[:2])
    assert all(reader.consumer not in {"2", "4"} for group in found.values() for reader in group)


def test_one_layer_of_convolution_in_one_and_three_dimensions():
    for convolution, norm, shape in [
        (nn.Conv1d, nn.BatchNorm1d, (5, 2, 9)),
        (nn.Conv3d, nn.BatchNorm3d, (3, 2, 5, 5, 5)),
    ]:
        torch.manual_seed(1)
        network = nn.Sequential(
            convolution(2, 4, 3), nn.ReLU(), convolution(4, 3, 3, stride=2), norm(3)
        ).eval()
        values = torch.randn(shape)
        site = find_sites(network, values[:1])[0]
        evidence = evidence_of(network, site, values)
        moments = Moments.of(network[:3](values))
        expected = distance(moments, stored(network[3]), 1e-5).log1p().mean()
        assert evidence.loss(torch.ones(4, dtype=torch.bool)) == pytest.approx(float(expected), rel=1e-4)
