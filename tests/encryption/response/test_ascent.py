"""The trade-off over λ, against all allocations of a network where greedy is best, and planted responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Budget, Ledger
from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Neurons, Original, Weights
from deepenc.encryption.response.ascent import tradeoff
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.objective import Form, Response, gain
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.network.sites import Role

MOST = 5
LAMS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 100.0)


class Fading(Weights):
    """Each channel of a site passes on less than the one before it, so that responses add up and flatten."""

    name = "fading"

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        values = []
        for gap in neurons.gaps:
            value = torch.full(gap.shape, 0.3, dtype=gap.victim.dtype)
            if gap.slot.role is Role.OUTGOING:
                value = (1.0 / (1 + torch.arange(gap.shape[gap.slot.dim]))).expand(gap.shape).clone()
            values.append(value)
        return values


class Sum(nn.Module):
    """Two branches whose channels have other prices, into one output to which all add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 6), nn.Linear(2, 4)
        self.more = nn.Linear(4, 1)
        self.out = nn.Linear(6, 1)
        self.wide = nn.Linear(3, 8)
        self.last = nn.Linear(8, 1)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.out(self.a(x[:, :2]).relu()), self.more(self.b(x[:, 2:4]).relu())
        third: Tensor = self.last(self.wide(x[:, :3]).relu())
        return left + 2 * right + third


@pytest.fixture
def branches() -> tuple[Original, Candidates, Ledger]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = Sum(), torch.rand(6, 4)
    original = Original(model, tuple(find_sites(model, data[:1])), data[:1], data)
    most = {site.name: MOST for site in original.sites}
    assert len(most) == 3
    found = Candidates.of(original, Fading(), np.random.default_rng(0), most)
    return original, found, Ledger(original, Budget(share=3.0))


@pytest.mark.parametrize("form", ["l2", "relative"])
def test_no_allocation_is_better(branches: tuple[Original, Candidates, Ledger], form: Form) -> None:
    original, found, ledger = branches
    names, state = [site.name for site in original.sites], original.model.state_dict()
    every = []
    for counts in itertools.product(range(MOST + 1), repeat=3):
        allocation = dict(zip(names, counts, strict=True))
        every.append((allocation, memory(state, original.sites, allocation), found.response(allocation)))
    curve = tradeoff(found, ledger, LAMS, form=form)
    assert [point.lam for point in curve] == list(LAMS)
    for point in curve:
        best = max(gain(response, cost, point.lam, form) for _, cost, response in every)
        # The relative response is a square: not concave, so that greedy may miss a little.
        assert point.gain == pytest.approx(best, rel=1e-6 if form == "l2" else 0.05, abs=1e-9)
        cost = memory(state, original.sites, point.allocation)
        assert point.memory == pytest.approx(cost.ratio)
        assert point.response == found.response(point.allocation)
        assert point.gain == gain(point.response, cost, point.lam, form)
    assert curve[0].allocation == dict.fromkeys(names, MOST)
    assert curve[-1].allocation == {} and curve[-1].gain == 0
    if form == "l2":
        assert len({tuple(sorted(point.allocation.items())) for point in curve}) >= 5


def test_it_stops_where_a_step_is_not_worth_its_memory(
    branches: tuple[Original, Candidates, Ledger],
) -> None:
    original, found, ledger = branches
    for point in tradeoff(found, ledger, LAMS):
        for site in original.sites:
            count = point.allocation.get(site.name, 0)
            price = point.lam * ledger.price(point.allocation, site.name) / ledger.total
            if count < MOST:
                more = found.response({**point.allocation, site.name: count + 1})
                assert more.l2 - point.response.l2 <= price + 1e-9
            if count:
                fewer = found.response({**point.allocation, site.name: count - 1})
                assert point.response.l2 - fewer.l2 >= price - 1e-9


@dataclass
class Curve:
    """The response to so many channels of the one site."""

    values: Sequence[float]
    most: dict[str, int] = field(default_factory=dict)

    def response(self, allocation: dict[str, int]) -> Response:
        value = self.values[sum(allocation.values())]
        return Response(value, value**2, value / 2)

    rebase = response


def line(values: Sequence[float]) -> tuple[Candidates, Ledger]:
    """Each channel adds a tenth of the network: 20 parameters to 200."""
    model = nn.Sequential(nn.Linear(8, 10, bias=False), nn.ReLU(), nn.Linear(10, 12, bias=False)).eval()
    example = torch.ones(1, 8)
    original = Original(model, tuple(find_sites(model, example)), example)
    ledger = Ledger(original, Budget(share=0.5))
    assert ledger.price({}, "0") / ledger.total == pytest.approx(0.1)
    return Curve(values, {"0": len(values) - 1}), ledger  # type: ignore[return-value]


def test_steps_that_are_worth_it_only_together() -> None:
    candidates, ledger = line([0, 0.1, 0.2, 1.0, 1.05])
    by_price = {point.lam: point for point in tradeoff(candidates, ledger, [3.0, 3.4, 0.6, 0.4])}
    assert by_price[3.0].allocation == {"0": 3}  # 1 - 0.9, though the first steps are worth 1 each
    assert by_price[3.0].gain == pytest.approx(0.1)
    assert by_price[3.4].allocation == {}
    assert by_price[0.6].allocation == {"0": 3}
    assert by_price[0.4].allocation == {"0": 4}
    halved = {point.lam: point for point in tradeoff(candidates, ledger, [1.5, 1.7], form="relative")}
    assert halved[1.5].allocation == {"0": 3} and halved[1.7].allocation == {}


def test_the_budget_bounds_it() -> None:
    candidates, ledger = line([float(n) for n in range(20)])
    (point,) = tradeoff(candidates, ledger, [0.0])
    assert point.allocation == {"0": 5}
    assert point.memory == pytest.approx(0.5)
    (wide,) = tradeoff(candidates, ledger, [0.0], step=3)
    assert wide.allocation == {"0": 5}


def test_what_overflowed_has_no_gain() -> None:
    candidates, ledger = line([0, 1.0, float("inf"), float("nan")])
    (point,) = tradeoff(candidates, ledger, [0.1])
    assert point.allocation == {"0": 1}


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_prices_that_there_are_not(lam: float) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        tradeoff(*line([0, 1]), [0.0, lam])
