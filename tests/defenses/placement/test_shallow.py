from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Ledger
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.sites import Site
from defenses.placement.shallow import Shallow

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def place(net: Net, **fields: object) -> tuple[dict[str, int], Ledger]:
    known = Original(net[0], net[2], net[1])
    shallow = Shallow.model_validate(fields)
    found = shallow.place(known, np.random.default_rng(0))
    ledger = Ledger(known, shallow.budget)
    assert shallow.budget.holds(known, found)
    assert all(ledger.room(found, site.name) == 0 for site in known.sites)
    return found, ledger


@pytest.mark.parametrize("budget", ["5%", 0.3, "150%", {"bytes": 20000}, {"parameters": 1000}])
def test_spends_the_budget_to_the_last_channel(planted: Net, budget: object) -> None:
    place(planted, budget=budget)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.1])
def test_counts_are_in_proportion(planted: Net, decay: float) -> None:
    # Widths are 20 and 40: the second site is due 2 decay times what the first one gets.
    found, ledger = place(planted, budget="300%", decay=decay)
    # The last ones go where they still fit.
    assert found["3"] == pytest.approx(2 * decay * found["0"], abs=5)
    assert ledger.cost(found) > 0.98 * ledger.limit


def test_first_site_alone_where_the_rest_is_due_nothing(planted: Net) -> None:
    found, ledger = place(planted, decay=1e-9)
    assert found["0"] == ledger.room({}, "0")


def test_what_cannot_be_meant(planted: Net) -> None:
    for wrong in ({"decay": 0}, {"decay": 1.1}, {"budget": 7}, {"budget": None}, {"width": 3}):
        with pytest.raises(ValidationError):
            Shallow.model_validate(wrong)
    with pytest.raises(ConfigError, match="below one channel"):
        place(planted, budget={"parameters": 3})
    with pytest.raises(ConfigError, match="layer9"):
        place(planted, sites="layer9")


def test_plain_data_makes_an_equal_one() -> None:
    shallow = Shallow.model_validate({"budget": "7%", "decay": 0.5})
    spec = {key: value for key, value in shallow.spec().items() if key != "name"}
    assert Shallow.model_validate(spec) == shallow
