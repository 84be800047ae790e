from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.arena.checks.tiny import TinyNet
from deepenc.encryption.cost.budget import Ledger
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from defenses.placement.gradient import Gradient, _keep


class Branches(nn.Module):
    """Two branches of one shape; what the second adds to the outputs is a ten-thousandth of the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.faint = nn.Linear(6, 40), nn.Linear(6, 40)
        self.loud_out, self.faint_out = nn.Linear(40, 4), nn.Linear(40, 4)
        with torch.no_grad():
            self.faint_out.weight /= 10000

    def forward(self, x: Tensor) -> Tensor:
        return self.loud_out(self.loud(x).relu()) + self.faint_out(self.faint(x).relu())


def original(model: nn.Module, data: Tensor) -> Original:
    return Original(model.eval(), tuple(find_sites(model, data[:1])), data[:1], data)


@pytest.fixture(scope="module")
def tiny() -> Original:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return original(TinyNet(), torch.randn(24, 3, 8, 8))


def test_channels_go_where_all_the_influence_is() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branches = original(Branches(), torch.randn(64, 6))
    found = Gradient.model_validate({"budget": "8%"}).place(branches, np.random.default_rng(0))
    assert found["loud"] >= 5
    assert found.get("faint", 0) <= 1


@pytest.mark.parametrize("budget", ["4%", "30%", {"bytes": 9000}, {"parameters": 1500}, {"flops": "5%"}])
@pytest.mark.parametrize("batch", [False, True])
def test_spends_the_budget_and_no_more(tiny: Original, budget: object, batch: bool) -> None:
    gradient = Gradient.model_validate({"budget": budget, "steps": 4, "batch_size": 8, "batch": batch})
    found = gradient.place(tiny, np.random.default_rng(0))
    ledger = Ledger(tiny, gradient.budget)
    assert ledger.cost(found) <= ledger.limit
    assert all(ledger.room(found, site.name) == 0 for site in tiny.sites)
    assert found == gradient.place(tiny, np.random.default_rng(0))


def test_strengths_keep_the_budget() -> None:
    logits = {"a": torch.tensor(3.0), "b": torch.tensor(0.5)}
    before = {name: each.clone() for name, each in logits.items()}
    prices = {"a": 0.8, "b": 0.5}
    _keep(logits, prices)
    assert sum(prices[n] * float(x.sigmoid()) for n, x in logits.items()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(logits["a"] - before["a"], logits["b"] - before["b"])


def test_only_the_sites_asked_for(tiny: Original) -> None:
    name = tiny.sites[1].name
    assert set(Gradient(sites=(name,), steps=2).place(tiny, np.random.default_rng(0))) == {name}


def test_the_victim_and_its_gradients_stay(tiny: Original) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    Gradient(steps=2, batch=True).place(tiny, np.random.default_rng(0))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.model.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


def test_what_cannot_be_meant(tiny: Original) -> None:
    with pytest.raises(ConfigError, match=r"gradient.*needs the defender's examples"):
        Gradient().place(Original(tiny.model, tiny.sites, tiny.example), np.random.default_rng(0))
    with pytest.raises(ConfigError, match="below one channel"):
        Gradient.model_validate({"budget": {"bytes": 1}}).place(tiny, np.random.default_rng(0))
