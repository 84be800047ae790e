from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepenc.encryption.cost.allocation import proportional, same_memory, select
from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.sites import Site

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


def sites(**widths: int) -> tuple[Site, ...]:
    return tuple(Site(name.replace("_", "."), width, ()) for name, width in widths.items())


FOUR = sites(layer1_0_conv1=16, layer1_1_conv1=16, layer2_0_conv1=32, head=64)


def test_patterns_choose_sites_in_the_networks_order() -> None:
    assert select(FOUR, ("*",)) == FOUR
    assert select(FOUR, ("head", "layer1.*")) == (*FOUR[:2], FOUR[3])
    assert select(FOUR, ("*.0.conv1",)) == (FOUR[0], FOUR[2])


def test_patterns_that_choose_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'haed'.*did you mean 'head'"):
        select(FOUR, ("*.conv1", "haed"))
    with pytest.raises(ConfigError, match="at least one pattern"):
        select(FOUR, ())
    with pytest.raises(ConfigError, match="no sites"):
        select((), ("*",))


def test_proportion_is_rounded_half_up_and_at_least_one() -> None:
    # 5 % of 10 is 0.5, of 30 is 1.5, of 50 is 2.5 (banker's rounding would give 0, 2, 2), of 4 is 0.2.
    assert proportional(sites(a=10, b=30, c=50, d=4), 0.05) == {"a": 1, "b": 2, "c": 3, "d": 1}
    # 14.5 exactly, though 0.145 * 100 is 14.499999999999998 in floats.
    assert proportional(sites(a=100), 0.145) == {"a": 15}
    assert proportional(sites(a=7), 1.0) == {"a": 7}


@given(st.integers(1, 5000))
def test_the_smallest_proportion_named_is_one_that_inserts(width: int) -> None:
    with pytest.raises(ConfigError, match="rounds to nothing") as caught:
        proportional(sites(a=width, b=1), 1e-9)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    assert 0.5 / width <= least <= 0.51 / width
    assert proportional(sites(a=width, b=1), least) == {"a": 1, "b": 1}


@pytest.mark.parametrize("proportion", [0.2, 0.3, 0.5, 1.0])
def test_same_memory_is_the_closest_of_all_counts(net: Net, proportion: float) -> None:
    model, inputs, found = net
    budget = proportional(found, proportion)
    original = Original(model, found, inputs)
    for chosen in (found, found[:1]):

        def cost(count: int) -> int:
            return memory(model.state_dict(), found, {site.name: count for site in chosen}).extra_bits  # noqa: B023

        wanted = memory(model.state_dict(), found, budget).extra_bits
        best = min(range(1, 60), key=lambda n: (abs(cost(n) - wanted), n))
        assert same_memory(original, chosen, budget) == best


def test_same_memory_by_hand(two_sites: Net) -> None:
    # 163 values more (see test_objective). One channel at both sites is 5x1x9 + 6x5x9 + 2x6x4 + 5 + 6 + 2,
    # 109 more than 267; two: 6x1x9 + 7x6x9 + 2x7x4 + 6 + 7 + 2 = 503, 236 more. 163 is closer to 109.
    model, inputs, found = two_sites
    assert same_memory(Original(model, found, inputs), found, {"0": 1, "2": 2}) == 1
    assert same_memory(Original(model, found, inputs), found, {"0": 2, "2": 2}) == 2
    assert torch.is_grad_enabled()
