from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Budget, Ledger
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from defenses.placement.knapsack import Curve, Knapsack, best, concave, gain_at, optimum

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def value(curves: dict[str, Curve], counts: dict[str, int]) -> float:
    return sum(
        np.interp(counts.get(name, 0), [x for x, _ in curve], [y for _, y in curve])
        for name, curve in curves.items()
    )


def drawn(rng: np.random.Generator, names: str = "abc") -> dict[str, Curve]:
    return {name: concave([(int(x), float(rng.random())) for x in (1, 3, 7)]) for name in names}


def test_concave_curves_by_hand() -> None:
    assert concave([(1, 1.0), (2, 1.5), (4, 3.5)]) == ((0, 0), (1, 1.0), (4, 3.5))
    assert concave([(1, 1.0), (2, 4.0), (3, 3.0)]) == ((0, 0), (2, 4.0), (3, 4.0))
    assert concave([(2, float("nan")), (4, 2.0)]) == ((0, 0), (4, 2.0))
    assert concave([]) == ((0, 0),)
    curve = ((0, 0.0), (2, 4.0), (5, 7.0))
    assert [gain_at(curve, n) for n in range(7)] == [2, 2, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(8))
def test_linear_prices_give_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = drawn(rng)
    prices = {name: float(rng.integers(20, 90)) for name in curves}
    limit = 400.0
    counts = best(curves, prices, limit)
    assert sum(prices[name] * count for name, count in counts.items()) <= limit
    every = (dict(zip("abc", c, strict=True)) for c in itertools.product(range(8), repeat=3))
    allowed = [c for c in every if sum(prices[name] * n for name, n in c.items()) <= limit]
    assert value(curves, counts) == pytest.approx(max(value(curves, c) for c in allowed))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_where_sites_meet_nearly_the_best_of_all(planted: Net, seed: int, share: float) -> None:
    ledger = Ledger(Original(planted[0], planted[2], planted[1]), Budget(share=share))
    rng = np.random.default_rng(seed)
    curves = {
        name: concave([(x, float(x ** rng.uniform(0.3, 1))) for x in (1, 5, 15, 40)]) for name in ("0", "3")
    }
    found = optimum(ledger, curves)
    assert ledger.cost(found) <= ledger.limit
    assert all(ledger.room(found, name) == 0 for name in curves)
    top = 0.0
    for first in range(ledger.room({}, "0") + 1):
        top = max(top, value(curves, {"0": first, "3": ledger.room({"0": first}, "3")}))
    assert value(curves, found) >= 0.97 * top


@pytest.mark.parametrize("budget", ["5%", {"bytes": 2000}])
def test_spends_the_budget_to_the_last_channel(budget: object) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
        data = torch.randn(32, 6)
    known = Original(net.eval(), tuple(find_sites(net, data[:1])), data[:1], data)
    knapsack = Knapsack.model_validate({"budget": budget})
    found = knapsack.place(known, np.random.default_rng(0))
    assert knapsack.budget.holds(known, found)
    assert all(Ledger(known, knapsack.budget).room(found, site.name) == 0 for site in known.sites)
    assert found == knapsack.place(known, np.random.default_rng(0))


def test_what_cannot_be_meant(planted: Net) -> None:
    known = Original(planted[0], planted[2], planted[1])
    with pytest.raises(ConfigError, match=r"knapsack.*needs the defender's examples.*data="):
        Knapsack().place(known, np.random.default_rng(0))
    for wrong in ({"points": 0}, {"budget": {"watts": 3}}, {"images": 0}):
        with pytest.raises(ValidationError):
            Knapsack.model_validate(wrong)


def test_plain_data_makes_an_equal_one() -> None:
    knapsack = Knapsack.model_validate({"budget": "3%", "points": 2})
    spec = {key: value for key, value in knapsack.spec().items() if key != "name"}
    assert Knapsack.model_validate(spec) == knapsack
