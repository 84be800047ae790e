from __future__ import annotations

import math

import numpy as np
import pytest
from torch import Tensor, nn

from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Original, Placement
from deepenc.errors import ConfigError
from deepenc.network.sites import Site
from deepenc.plugins import build

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def place(net: Net, spec: str | dict[str, object]) -> dict[str, int]:
    placement = build("placement", spec)
    assert isinstance(placement, Placement)
    assert build("placement", placement.spec()) == placement
    return placement.place(Original(net[0], net[2], net[1]), np.random.default_rng(0))


def extra(net: Net, allocation: dict[str, int]) -> int:
    return memory(net[0].state_dict(), net[2], allocation).extra_bits // 32


def test_proportional(planted: Net) -> None:
    assert place(planted, "proportional") == {"0": 1, "3": 2}
    assert place(planted, "proportional:proportion=0.24") == {"0": 5, "3": 10}
    assert place(planted, {"name": "proportional", "proportion": 1, "sites": ["3"]}) == {"3": 40}


def test_absolute_count(planted: Net) -> None:
    assert place(planted, "absolute:count=5") == {"0": 5, "3": 5}
    assert place(planted, {"name": "absolute", "count": 2, "sites": ["0"]}) == {"0": 2}
    assert place(planted, {"name": "absolute", "count": 2, "sites": "*"}) == {"0": 2, "3": 2}


def test_absolute_proportion_is_the_count_of_closest_memory(planted: Net) -> None:
    assert place(planted, "absolute") == place(planted, "absolute:proportion=0.05")
    for proportion in (0.05, 0.2, 0.5, 1.0):
        wanted = extra(planted, place(planted, f"proportional:proportion={proportion}"))
        chosen = place(planted, f"absolute:proportion={proportion}")
        assert len(set(chosen.values())) == 1
        best = min(range(1, 200), key=lambda k: abs(extra(planted, {"0": k, "3": k}) - wanted))
        assert chosen == {"0": best, "3": best}


def test_single_puts_the_same_memory_into_one_site_or_block(planted: Net) -> None:
    wanted = extra(planted, place(planted, "proportional:proportion=0.5"))
    # A channel of the first site: 27 + 1 + 4 + 160; of the second: 80 + 1 + 5.
    assert place(planted, "single:proportion=0.5") == {"0": round(wanted / 192)}
    assert place(planted, "single:proportion=0.5,block=3") == {"3": round(wanted / 86)}
    own = extra(planted, {"3": 20})
    assert own == 20 * 86
    spec = {"name": "single", "proportion": 0.5, "sites": ["3"]}
    assert place(planted, spec) == {"3": 20}


def test_single_shares_a_block_evenly(planted: Net) -> None:
    net, inputs, (first, second) = planted
    renamed = (Site("layer1.0.conv1", 20, first.slots), Site("layer1.0.conv2", 40, second.slots))
    both = place((net, inputs, renamed), "single:block=layer1.0")
    assert both == {site.name: place(planted, "absolute")["0"] for site in renamed}
    assert list(place((net, inputs, renamed), "single:block=layer1.0.conv2")) == ["layer1.0.conv2"]
    with pytest.raises(ConfigError, match=r"'layer1.1'.*did you mean.*'layer1'"):
        place((net, inputs, renamed), "single:block=layer1.1")
    with pytest.raises(ConfigError, match="block"):
        place((net, inputs, renamed), "single:block=lay")


@pytest.mark.parametrize("name", ["absolute", "proportional", "single"])
@pytest.mark.parametrize("proportion", [0, -0.1, 1.1, math.nan, math.inf, "much"])
def test_proportions_that_cannot_be_meant(name: str, proportion: object) -> None:
    with pytest.raises(ConfigError, match="proportion"):
        build("placement", {"name": name, "proportion": proportion})


@pytest.mark.parametrize("name", ["absolute:proportion=0.0001", "proportional:proportion=0.0001",
                                  "single:proportion=0.0001"])  # fmt: skip
def test_proportions_that_round_to_nothing(planted: Net, name: str) -> None:
    with pytest.raises(ConfigError, match=r"rounds to nothing.*0\.0125"):
        place(planted, name)


@pytest.mark.parametrize("name", ["absolute", "proportional", "single"])
def test_sites_that_are_not_there(planted: Net, name: str) -> None:
    with pytest.raises(ConfigError, match="layer9"):
        place(planted, {"name": name, "sites": ["layer9.*"]})


def test_counts_that_cannot_be_meant() -> None:
    for spec in ("absolute:count=0", "absolute:count=-3", "absolute:count=1.5", "absolute:count=1000000000",
                 "absolute:count=3,proportion=0.1", "absolute:cuont=3"):  # fmt: skip
        with pytest.raises(ConfigError, match="absolute"):
            build("placement", spec)
