"""Response against memory, beside all allocations there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.budget import Budget, Ledger
from deepenc.encryption.candidates import Candidates
from deepenc.encryption.defense import Original
from deepenc.encryption.objective import headless, memory, response_change
from deepenc.encryption.tensors import tensors_of
from deepenc.encryption.tradeoff import tradeoff
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.plugins import build


class Sum(nn.Module):
    """Two branches that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(part(x) for part in self.parts)


@pytest.fixture(scope="module")
def original() -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Sum().eval(), torch.randn(32, 5)
    return Original(model, tuple(find_sites(model, data[:1])), data[:1], data)


@pytest.mark.parametrize("sites", [1, 2])
def test_beside_all_allocations(original: Original, sites: int) -> None:
    """At one site the path is all there is, so that its best is the best of all; at two it is a bound."""
    some = original.sites[:sites]
    most = {site.name: 3 for site in some}
    candidates = Candidates.of(original, build("weights", "samp"), np.random.default_rng(1), most)
    ledger = Ledger(original, Budget(share=2.0), some)
    lams = [0.0, 0.5, 2.0, 8.0, 1e6]
    points = tradeoff(original, candidates, ledger, lams)
    tensors = tensors_of(original.model)
    every = [dict(zip(most, counts, strict=True)) for counts in itertools.product(range(4), repeat=sites)]
    for lam, point in zip(lams, points, strict=True):
        worth = [candidates.response(a).l2 - lam * memory(tensors, original.sites, a).ratio for a in every]
        assert point.gain <= max(worth) + 1e-9
        assert sites > 1 or point.gain == pytest.approx(max(worth))
        cost = memory(tensors, original.sites, point.allocation).ratio
        assert point.gain == pytest.approx(candidates.response(point.allocation).l2 - lam * cost)
    assert points[-1].allocation == {}
    costs = [point.memory for point in points]
    assert costs == sorted(costs, reverse=True)


def test_a_form_of_the_response(original: Original) -> None:
    most = {site.name: 2 for site in original.sites}
    candidates = Candidates.of(original, build("weights", "samp"), np.random.default_rng(1), most)
    (point,) = tradeoff(original, candidates, Ledger(original, Budget(share=1.0)), [0.0], "relative")
    assert point.response == candidates.response(point.allocation).relative


@pytest.mark.parametrize("lams", [[], [-1.0]])
def test_prices_that_cannot_be_meant(original: Original, lams: list[float]) -> None:
    most = {site.name: 1 for site in original.sites}
    candidates = Candidates.of(original, build("weights", "samp"), np.random.default_rng(1), most)
    with pytest.raises(ConfigError, match="at least 0"):
        tradeoff(original, candidates, Ledger(original, Budget(share=1.0)), lams)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).tanh())


def test_features_are_what_the_last_layer_gets() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Deep().eval(), torch.randn(16, 4)
    expected = model.second(model.first(data).relu()).tanh()
    assert torch.equal(headless(model, data)(data), expected)
    sites = tuple(site for site in find_sites(model, data[:1]) if site.name == "first")
    original = Original(model, sites, data[:1], data)
    candidates = Candidates.of(
        original, build("weights", "samp"), np.random.default_rng(0), {"first": 3}, measure="features"
    )
    wide = candidates.network({"first": 2})
    with torch.no_grad():
        changed = (wide(data).double() - expected.double()).square().sum(1).sqrt().mean()
    assert candidates.response({"first": 2}).l2 == pytest.approx(float(changed))


def test_features_by_response_change() -> None:
    """The head is not looked at: two networks that differ in nothing else have the same features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one, data = Deep().eval(), torch.randn(16, 4)
        two = Deep().eval()
    state = one.state_dict() | {k: v for k, v in two.state_dict().items() if "head" in k}
    two.load_state_dict(state)
    assert response_change(one, two, data, measure="features").l2 == 0
    assert response_change(one, two, data).l2 > 0
    probable = response_change(one, two, data, measure="probabilities")
    with torch.no_grad():
        by_hand = (one(data).double().softmax(1) - two(data).double().softmax(1)).norm(dim=1).mean()
    assert probable.l2 == pytest.approx(float(by_hand))


def test_networks_without_features() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.Softmax(1)).eval()
    with pytest.raises(ConfigError, match="does not end with a linear layer"):
        response_change(net, net, torch.randn(2, 4), measure="features")


def test_confusion_channels_among_the_features(original: Original) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = torch.randn(8, 4)
    found = Original(net, tuple(find_sites(net, data[:1])), data[:1], data)
    with pytest.raises(ConfigError, match="among the features"):
        Candidates.of(found, build("weights", "samp"), np.random.default_rng(0), {"0": 1}, measure="features")
