"""Costs in time, with clocks that the tests made."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from deepenc.encryption import latency as module
from deepenc.encryption.budget import Budget, Ledger
from deepenc.encryption.defense import Original
from deepenc.encryption.latency import LEAST, latency, timed_once
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites


def original(model: nn.Module, example: torch.Tensor) -> Original:
    return Original(model.eval(), tuple(find_sites(model, example)), example)


@pytest.fixture(scope="module")
def plain() -> Original:
    """A channel at the first site has 44 parameters, at the second 78; four more where two meet."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    return original(net, torch.randn(2, 3, 6, 6))


def parameters(network: nn.Module, example: object) -> int:
    return 1000 * sum(p.numel() for p in network.parameters())


def test_a_clock_that_counts_parameters(plain: Original) -> None:
    """Two channels more and one: half of what they cost each other falls on each site."""
    costs = latency(plain, parameters)
    assert costs.total == parameters(plain.model, plain.example) // 2
    assert costs.price({}, "0", 1) == 1000 * (44 + 2) // 2
    assert costs.price({"0": 5}, "2", 2) == 2 * (1000 * (78 + 4) // 2)


def test_nothing_is_free(plain: Original) -> None:
    """The second site takes no time: a tenth of what its memory lets one expect, and the sum stays."""
    costs = latency(plain, lambda network, _: 10**5 + 1000 * (network[0].weight.shape[0] - 8))  # type: ignore[index]
    least = LEAST * 2000 * 78 / (88 + 78)
    scale = 2000 / (2000 + least)
    assert costs.price({}, "0", 1) == round(scale * 2000 / 4)
    assert costs.price({}, "2", 1) == round(scale * least / 2)


def chain() -> Original:
    """Ten sites of 16 channels."""
    layers = [layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return original(nn.Sequential(*layers, nn.Linear(16, 2)), torch.randn(1, 16))


class Busy:
    """A clock of so many nanoseconds a channel, on a machine that is busy, and ever busier."""

    def __init__(self, each: np.ndarray, noise: float) -> None:
        self.each, self.noise, self.runs = each, noise, 0
        self.rng = np.random.default_rng(5)

    def __call__(self, network: nn.Module, example: object) -> int:
        self.runs += 1
        more = [network[2 * i].weight.shape[0] - 16 for i in range(10)]  # type: ignore[index]
        taken = 10**6 + float(np.dot(self.each, more))
        return int(taken * (1 + self.runs / 10**5) + self.rng.exponential(self.noise))


def test_noise_and_drift() -> None:
    """Noise of ten channels: of single prices a tenth of it is left, and of their sum a few percent."""
    each = np.arange(1, 11) * 1000.0
    found = latency(chain(), Busy(each, noise=1e4))
    prices = np.array([found.price({}, str(2 * i), 1) for i in range(10)])
    assert prices.sum() == pytest.approx(each.sum(), rel=0.1)
    assert np.abs(prices - each).max() < 2000
    assert np.corrcoef(prices, each)[0, 1] > 0.95
    assert found.total == pytest.approx(10**6, rel=0.02)


def test_one_slow_start_makes_nothing_free() -> None:
    clock = Busy(np.full(10, 1000.0), noise=0.0)
    costs = latency(chain(), lambda network, example: clock(network, example) + 10**9 * (clock.runs < 4))
    assert all(costs.price({}, str(2 * i), 1) == pytest.approx(1000, rel=0.2) for i in range(10))


@pytest.mark.parametrize("noise", [0.0, 1e7])
def test_channels_that_take_no_time(noise: float) -> None:
    clock = Busy(np.zeros(10), noise)
    with pytest.raises(ConfigError, match=r"not more than noise; give the budget in operations"):
        latency(chain(), clock)


def test_further_rounds_where_one_does_not_do(plain: Original) -> None:
    """The first round is all noise; what is fastest counts, so that the second mends it."""
    asked, rng = 0, np.random.default_rng(0)

    def clock(network: nn.Module, example: object) -> int:
        nonlocal asked
        asked += 1
        return parameters(network, example) if asked > 50 else 10**9 + int(rng.exponential(10**9))

    assert latency(plain, clock).price({}, "0", 1) == 1000 * (44 + 2) // 2
    assert asked == 4 + 2 * (8 * 2 * 3)  # so slow that it is timed no more often than it must be


@pytest.mark.parametrize("limit", ["50%", 0.1])
def test_a_ledger_keeps_to_it(plain: Original, monkeypatch: pytest.MonkeyPatch, limit: str | float) -> None:
    monkeypatch.setattr(module, "timed_once", parameters)
    ledger = Ledger(plain, Budget(latency=limit))
    total = 1000 * (8 * 28 + 4 * 33 + 185) // 2
    assert ledger.total == total
    assert ledger.limit == (total // 2 if limit == "50%" else 10**5)
    assert ledger.room({}, "0") == ledger.limit // 23000
    with pytest.raises(ConfigError, match=re.escape("1000 nanoseconds is below one channel anywhere")):
        Ledger(plain, Budget(latency=0.001))


def test_the_clock_runs_the_network(plain: Original) -> None:
    runs = []
    hook = plain.model.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    assert timed_once(plain.model, plain.example) > 0
    hook.remove()
    assert runs == [False]
