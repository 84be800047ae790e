from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deepenc.arena.checks.tiny import TinyNet
from deepenc.encryption.cost.budget import Ledger
from deepenc.encryption.defense import Original
from deepenc.encryption.response.candidates import Candidates
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from defenses.placement.greedy import Greedy

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


@pytest.fixture(scope="module")
def tiny() -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = TinyNet().eval(), torch.randn(24, 3, 8, 8)
    return Original(model, tuple(find_sites(model, data[:1])), data[:1], data)


@pytest.mark.parametrize(("budget", "step"), [("2%", 1), ({"bytes": 9000}, 3), ({"parameters": 1500}, 2)])
def test_spends_the_budget_to_the_last_channel(tiny: Original, budget: object, step: int) -> None:
    greedy = Greedy.model_validate({"budget": budget, "step": step, "images": 8})
    found = greedy.place(tiny, np.random.default_rng(0))
    ledger = Ledger(tiny, greedy.budget)
    assert greedy.budget.holds(tiny, found)
    assert all(ledger.room(found, site.name) == 0 for site in tiny.sites)
    assert found == greedy.place(tiny, np.random.default_rng(0))


def test_first_step_is_the_best_of_all(tiny: Original) -> None:
    # A budget of just the dearest channel: whatever is chosen first must change the outputs most per bit.
    plain = Ledger(tiny, Greedy().budget)
    dearest = max(plain.price({}, site.name) for site in tiny.sites) // 8
    greedy = Greedy.model_validate({"budget": {"bytes": dearest}})
    ledger = Ledger(tiny, greedy.budget)
    found = greedy.place(tiny, np.random.default_rng(3))
    most = {site.name: ledger.room({}, site.name) for site in tiny.sites}
    same = Candidates.of(tiny, greedy.weights, np.random.default_rng(3), most)
    scores = {name: same.response({name: 1}).l2 / ledger.price({}, name) for name, n in most.items() if n}
    assert found[max(scores, key=lambda name: scores[name])] >= 1


def test_beats_the_same_memory_placed_evenly(tiny: Original) -> None:
    greedy = Greedy(images=24)
    ledger = Ledger(tiny, greedy.budget)
    found = greedy.place(tiny, np.random.default_rng(0))
    even = max(n for n in range(50) if ledger.cost({s.name: n for s in tiny.sites}) <= ledger.limit)
    most = {s.name: max(even, found.get(s.name, 0)) for s in tiny.sites}
    for seed in (5, 6):  # other confusion weights than those of the search
        fresh = Candidates.of(tiny, greedy.weights, np.random.default_rng(seed), most)
        assert fresh.response(found).l2 > fresh.response({s.name: even for s in tiny.sites}).l2


def test_features_that_the_last_site_does_not_change(tiny: Original) -> None:
    """Its own channels go into the last Linear; what is left of the budget goes there, and no more."""
    greedy = Greedy.model_validate({"budget": "2%", "measure": "features"})
    found, ledger = greedy.place(tiny, np.random.default_rng(0)), Ledger(tiny, greedy.budget)
    *before, last = (site.name for site in tiny.sites)
    spent = {name: found.get(name, 0) for name in before}
    assert found.get(last, 0) == ledger.room(spent, last)
    most = {site.name: ledger.room({}, site.name) for site in tiny.sites}
    same = Candidates.of(tiny, greedy.weights, np.random.default_rng(0), most, measure="features")
    assert same.response({last: 1}).l2 == 0 < same.response({before[0]: 1}).l2


def test_only_the_sites_asked_for(tiny: Original) -> None:
    name = tiny.sites[1].name
    assert set(Greedy(sites=(name,), budget=Greedy().budget).place(tiny, np.random.default_rng(0))) == {name}


def test_what_cannot_be_meant(planted: Net) -> None:
    known = Original(planted[0], planted[2], planted[1])
    with pytest.raises(ConfigError, match=r"greedy.*needs the defender's examples.*data="):
        Greedy().place(known, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="below one channel"):
        Greedy.model_validate({"budget": {"bytes": 1}}).place(
            Original(*(planted[0], planted[2], planted[1], planted[1])), np.random.default_rng(0)
        )
    for wrong in (
        {"budget": "5 furlongs"},
        {"step": 0},
        {"images": 1},
        {"widest": 0},
        {"measure": "l3"},
        {"measure": "features:"},
    ):
        with pytest.raises(ValidationError):
            Greedy.model_validate(wrong)


def test_plain_data_makes_an_equal_one() -> None:
    greedy = Greedy.model_validate({"budget": {"bytes": 9000}, "weights": "init", "step": 2})
    spec = greedy.spec()
    assert spec["name"] == "greedy"
    assert spec["budget"] == {"bytes": 9000}
    assert Greedy.model_validate({key: value for key, value in spec.items() if key != "name"}) == greedy
