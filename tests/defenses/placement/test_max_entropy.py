from __future__ import annotations

from math import comb, log2

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Ledger
from deepenc.encryption.defense import Original
from deepenc.encryption.response.candidates import Candidates
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.plugins import build
from defenses.placement.max_entropy import MaxEntropy

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def key_bits(net: Net, counts: dict[str, int]) -> float:
    return sum(log2(comb(s.width + counts.get(s.name, 0), s.width)) for s in net[2])


@pytest.mark.parametrize("budget", ["3%", "5%", "20%", {"bytes": 9000}, {"parameters": 3000}])
def test_nearly_the_most_key_bits_of_all(planted: Net, budget: object) -> None:
    known = Original(planted[0], planted[2], planted[1])
    placement = MaxEntropy.model_validate({"budget": budget})
    found = placement.place(known, np.random.default_rng(0))
    ledger = Ledger(known, placement.budget)
    assert placement.budget.holds(known, found)
    assert all(ledger.room(found, site.name) == 0 for site in known.sites)
    best = 0.0
    for first in range(ledger.room({}, "0") + 1):  # for each, as many at the other as fit
        counts = {"0": first} if first else {}
        counts["3"] = ledger.room(counts, "3")
        best = max(best, key_bits(planted, counts))
    last = log2(planted[2][1].width + 1)  # all but the last channel
    assert best - last <= key_bits(planted, found) <= best + 1e-9


@pytest.fixture
def random() -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))
        data = torch.randn(64, 6)
    return Original(net.eval(), tuple(find_sites(net, data[:1])), data[:1], data)


def test_floor_is_reached(random: Original) -> None:
    plain = MaxEntropy.model_validate({"budget": "20%"})
    ledger = Ledger(random, plain.budget)
    most = {site.name: ledger.room({}, site.name, site.width) for site in random.sites}
    same = Candidates.of(random, build("weights", "samp"), np.random.default_rng(0), most)
    without = same.response(plain.place(random, np.random.default_rng(0))).relative
    floored = MaxEntropy.model_validate({"budget": "20%", "floor": without / 2})
    found = floored.place(random, np.random.default_rng(0))
    assert floored.budget.holds(random, found)
    assert same.response(found).relative >= without / 2
    with pytest.raises(ConfigError, match="below the floor of 1e\\+06; ask for a lower floor"):
        MaxEntropy.model_validate({"floor": 1e6, "budget": "20%"}).place(random, np.random.default_rng(0))


def test_what_cannot_be_meant(planted: Net) -> None:
    known = Original(planted[0], planted[2], planted[1])
    with pytest.raises(ConfigError, match=r"max-entropy.*floor.*data="):
        MaxEntropy(floor=0.1).place(known, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="below one channel"):
        MaxEntropy.model_validate({"budget": {"bytes": 3}}).place(known, np.random.default_rng(0))
    for wrong in ({"floor": -1}, {"floor": float("inf")}, {"budget": "much"}):
        with pytest.raises(ValidationError):
            MaxEntropy.model_validate(wrong)


def test_plain_data_makes_an_equal_one() -> None:
    placement = MaxEntropy.model_validate({"budget": {"parameters": 70}, "floor": 0.2})
    spec = {key: value for key, value in placement.spec().items() if key != "name"}
    assert MaxEntropy.model_validate(spec) == placement
