"""Costs in operations, against counts by hand and of whole networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepenc.encryption.cost.budget import Budget, Ledger
from deepenc.encryption.cost.costs import Quadratic, flops
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.calling import Arguments
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout, insert
from deepenc.victims.models import CifarResNet


def original(model: nn.Module, example: torch.Tensor) -> Original:
    return Original(model.eval(), tuple(find_sites(model, example)), example)


@pytest.fixture(scope="module")
def plain() -> Original:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    return original(net, torch.randn(2, 3, 6, 6))


def test_operations_by_hand(plain: Original) -> None:
    """Maps of 4x4 and 3x3; a multiplication with its addition is two operations."""
    costs = flops(plain)
    assert costs.total == 2 * (16 * 8 * 27 + 9 * 4 * 32 + 36 * 5)
    assert costs.price({}, "0", 1) == 2 * (16 * 27 + 9 * 4 * 4)
    assert costs.price({}, "2", 1) == 2 * (9 * 32 + 9 * 5)
    together = costs.cost({"0": 2, "2": 3})
    assert together == 2 * (2 * (16 * 27 + 9 * 4 * 4) + 3 * (9 * 32 + 9 * 5) + 6 * 9 * 4)
    assert costs.price({"0": 2}, "2", 3) == together - costs.cost({"0": 2})


def test_operations_of_whole_networks() -> None:
    """Streams widen tensors along both dimensions at once."""
    model, example = CifarResNet(8, channels=1).eval(), torch.randn(1, 1, 8, 8)
    sites = tuple(find_sites(model, example, streams=True))
    whole = Original(model, sites, example)
    costs = flops(whole)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        counts = {site.name: int(torch.randint(0, 4, (), generator=generator)) for site in sites}
        places = {s.name: tuple(range(s.width, s.width + counts[s.name])) for s in sites}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            insert(model, Layout(sites, places))(example)
        assert costs.total + costs.cost(counts) == counter.get_total_flops()


class Gram(nn.Module):
    """Channels are multiplied with one another, and meet in no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.make(x)
        return (rows.transpose(1, 2) @ rows).sum((1, 2))


def test_operations_where_channels_meet_in_no_weight() -> None:
    slots = (Slot("make.weight", 0, Role.INCOMING), Slot("make.bias", 0, Role.BIAS))
    costs = flops(Original(Gram().eval(), (Site("make", 6, slots),), torch.randn(2, 5, 3)))
    for count in (1, 2, 7):
        width = 6 + count
        assert costs.total + costs.cost({"make": count}) == 2 * (5 * 3 * width + width * 5 * width)


class Cube(Gram):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.make(x)
        gram = rows.transpose(1, 2) @ rows
        return (gram @ gram).sum((1, 2))


def test_operations_that_are_no_sum_over_pairs() -> None:
    slots = (Slot("make.weight", 0, Role.INCOMING), Slot("make.bias", 0, Role.BIAS))
    with pytest.raises(ConfigError, match=r"Cube are no sum over.*give the budget in memory"):
        flops(Original(Cube().eval(), (Site("make", 6, slots),), torch.randn(2, 5, 3)))


class Looks(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_operations_of_networks_that_look_at_values(plain: Original) -> None:
    model = Looks(*plain.model)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="Looks cannot be counted"):
        flops(Original(model.eval(), plain.sites, plain.example))


def test_examples_of_several_arguments(plain: Original) -> None:
    alone = flops(plain)
    for example in ((plain.example,), {"input": plain.example}, Arguments((plain.example,), {})):
        assert flops(Original(plain.model, plain.sites, example)).total == alone.total


def test_pairs_by_hand() -> None:
    costs = Quadratic(100, {"a": 5, "b": 7}, {("a", "b"): 2, ("a", "a"): 10})
    assert costs.cost({"a": 3, "b": 4}) == 3 * 5 + 4 * 7 + 12 * 2 + 3 * 10
    assert costs.price({"a": 3, "b": 4}, "a", 2) == 2 * 5 + 8 * 2 + (10 - 3) * 10
    assert costs.price({"a": 3, "b": 4}, "b", -1) == -7 - 3 * 2


@pytest.mark.parametrize("budget", [{"flops": "50%"}, {"flops": 5000.0}])
def test_a_ledger_keeps_to_it(plain: Original, budget: dict[str, object]) -> None:
    ledger = Ledger(plain, Budget.model_validate(budget), plain.sites)
    count = ledger.room({}, "0")
    assert count > 0
    assert ledger.cost({"0": count}) <= ledger.limit < ledger.cost({"0": count + 1})


def test_a_budget_of_operations_below_one_channel(plain: Original) -> None:
    with pytest.raises(ConfigError, match="operations is below one channel"):
        Ledger(plain, Budget(flops=3.0))
