"""The paper's p^L: worked out by hand, and the same as the metrics say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepenc.arena.layers import per_layer, site_success
from deepenc.arena.metrics import detection
from deepenc.network.sites import Role, Site, Slot

POSITIONS = {"a": (1, 3), "b": (0,), "c": ()}


def site(name, width):
    return Site(name, width, (Slot(f"{name}.weight", 0, Role.INCOMING),))


SITES = (site("a", 5), site("b", 3), site("c", 4))


def test_success_is_every_confusion_channel_above_every_real_one():
    right = {"a": np.array([0.0, 5, 1, 2, 1.9]), "b": np.array([1.0, 0, 0])}
    assert site_success(right, SITES, POSITIONS) == {"a": True, "b": True}
    tied = {"a": np.array([0.0, 5, 2, 2, 1])}  # and no scores for b
    assert site_success(tied, SITES, POSITIONS) == {"a": False, "b": False}


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_success_agrees_with_the_metrics(values):
    scores = {"a": np.array(values[:5], dtype=float), "b": np.array(values[5:], dtype=float)}
    measured = detection(scores, SITES, POSITIONS)
    assert sum(site_success(scores, SITES, POSITIONS).values()) == measured.exact_sites


def test_product_and_joint_differ_where_sites_fail_together():
    # Each site is found for one key of two; were they independent, both would be for one key of four.
    together = per_layer([{"a": True, "b": True}, {"a": False, "b": False}])
    assert (together.rates, together.product) == ({"a": 0.5, "b": 0.5}, 0.25)
    assert (together.joint, together.mean, together.keys, together.sites) == (0.5, 0.5, 2, 2)
    apart = per_layer([{"a": True, "b": False}, {"a": False, "b": True}])
    assert (apart.product, apart.joint, apart.mean) == (0.25, 0.0, 0.5)


@pytest.mark.parametrize("successes", [[], [{}], [{"a": True}, {"b": True}]])
def test_keys_of_other_sites_are_refused(successes):
    with pytest.raises(ValueError, match="same sites"):
        per_layer(successes)
