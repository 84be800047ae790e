from __future__ import annotations

import itertools
from math import comb, log2

import numpy as np
import pytest
from pydantic import ValidationError
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Budget, Ledger, caps, grow
from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError, SiteError
from deepenc.network.sites import Site

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def original(net: Net) -> Original:
    return Original(net[0], net[2], net[1])


def test_costs_are_those_of_equation_1(net: Net) -> None:
    model, _, sites = net
    ledger = Ledger(original(net), Budget(share=1.0))
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = {site.name: int(rng.integers(0, 9)) for site in sites}
        extra = memory(model.state_dict(), sites, counts).extra_bits
        assert ledger.cost(counts) == extra
        name = sites[int(rng.integers(len(sites)))].name
        more = memory(model.state_dict(), sites, {**counts, name: counts[name] + 3}).extra_bits
        assert ledger.price(counts, name, 3) == more - extra
    assert ledger.limit == memory(model.state_dict(), sites, {}).bits


def test_units_by_hand(two_sites: Net, small: Net) -> None:
    # 267 floats; a channel of the first site adds 9 + 1 + 45 of them, one of the second 36 + 1 + 8.
    known = original(two_sites)
    assert Budget(bytes=4 * 55).holds(known, {"0": 1})
    assert not Budget(bytes=4 * 55 - 1).holds(known, {"0": 1})
    assert Budget(parameters=55).holds(known, {"0": 1})
    assert Budget(parameters=110).spent(known, {"0": 1}) == 0.5
    assert Budget(share=0.5).spent(known, {"2": 1}) == pytest.approx(45 / 133.5, rel=0.01)
    # Two running statistics a channel are memory, but no parameters: 3 + 1 + 2 + 2 are.
    assert Budget(parameters=8).holds(original(small), {"0": 1})
    assert not Budget(bytes=79).holds(original(small), {"0": 2})
    assert Budget(bytes=80).holds(original(small), {"0": 2})


@pytest.mark.parametrize(
    ("text", "unit"),
    [("5%", {"share": 0.05}), (0.05, {"share": 0.05}), ("0.05", {"share": 0.05}), ("120 %", {"share": 1.2}),
     ({"bytes": 20000}, {"bytes": 20000}), ({"parameters": 1000}, {"parameters": 1000})],
)  # fmt: skip
def test_what_can_be_written(text: object, unit: dict[str, object]) -> None:
    budget = Budget.model_validate(text)
    assert budget.spec() == unit
    assert Budget.model_validate(budget.spec()) == budget


@pytest.mark.parametrize(
    ("text", "remedy"),
    [(5, "did you mean '5%'"), ("5 parsecs", "cannot read"), ({"watts": 3}, "unknown unit 'watts'"),
     ({"bytes": 3, "parameters": 3}, "exactly one"), ({}, "exactly one"), (0, "greater than 0"), ("-1%", "0"),
     ("2000%", "less than or equal to 10"), (float("nan"), "finite"), ({"bytes": 0}, "1"), ("1/0", "cannot"),
         ({"flops": "x%"}, "cannot read"), ({"flops": 0}, "above 0"), ({"flops": "2000%"}, "up to 1000%"),
         ({"flops": True}, "a number or a share"), ({"flops": 1, "bytes": 1}, "exactly one")],
)  # fmt: skip
def test_what_cannot_be_meant(text: object, remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        Budget.model_validate(text)


def test_budgets_that_do_not_fit_the_network(two_sites: Net, small: Net) -> None:
    with pytest.raises(ConfigError, match=r"179 bytes is below one channel.*'2', takes 180 bytes, 16\.854%"):
        Ledger(original(two_sites), Budget(bytes=179))
    Ledger(original(two_sites), Budget(share=0.16854))
    with pytest.raises(ConfigError, match="below one channel"):
        Ledger(original(two_sites), Budget(parameters=45), two_sites[2][:1])
    with pytest.raises(ConfigError, match="more than 10 times the network's 267"):
        Ledger(original(two_sites), Budget(parameters=2671))
    with pytest.raises(SiteError, match="another network"):
        Ledger(Original(small[0], two_sites[2], small[1]), Budget(share=0.05))


def test_room_is_the_largest_that_fits(net: Net) -> None:
    ledger = Ledger(original(net), Budget(share=1.0))
    for site, start in itertools.product(net[2], (0, 1)):
        counts = {other.name: start for other in net[2]}
        fits = [n for n in range(60) if ledger.cost({**counts, site.name: start + n}) <= ledger.limit]
        assert ledger.room(counts, site.name) == max(fits, default=0)
        for most in (0, 1, 2, 3, 5):
            assert ledger.room(counts, site.name, most) == min(most, max(fits, default=0))
    assert caps(ledger, 0.5) == {s.name: min(s.width // 2, ledger.room({}, s.name)) for s in net[2]}


def test_growth_ends_where_nothing_fits(net: Net) -> None:
    ledger = Ledger(original(net), Budget(share=0.9))
    counts = grow(ledger, {}, lambda site, count, price: 1 / price)
    assert 0 < ledger.cost(counts) <= ledger.limit
    assert all(ledger.room(counts, site.name) == 0 for site in net[2])
    capped = grow(ledger, {}, lambda site, count, price: 1 / price, dict.fromkeys(counts, 1))
    assert set(capped.values()) == {1}


def test_growth_takes_the_best_each_time(two_sites: Net) -> None:
    ledger = Ledger(original(two_sites), Budget(share=3.0))
    counts: dict[str, int] = {"0": 0, "2": 0}
    while True:  # the same, looking at every site every time
        scores = {}
        for site in two_sites[2]:
            price = ledger.price(counts, site.name)
            if ledger.cost(counts) + price <= ledger.limit:
                now, then = (comb(site.width + n, n) for n in (counts[site.name], counts[site.name] + 1))
                scores[site.name] = (log2(then) - log2(now)) / price
        if not scores:
            break
        counts[max(scores, key=lambda name: scores[name])] += 1
    found = grow(ledger, {}, lambda site, count, price: log2((site.width + count + 1) / (count + 1)) / price)
    assert found == counts
