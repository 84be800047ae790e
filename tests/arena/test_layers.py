"""The paper's p^L, worked out by hand."""

import pytest

from deepenc.arena.layers import Layers, per_layer
from deepenc.arena.record import Detection


def found(*names, sites=2):
    return Detection(
        auc=0.5,
        average_precision=0.1,
        tpr=0,
        exact_sites=len(names),
        found=names,
        sites=sites,
        bits_left=1,
        bits=9,
    )


def test_product_and_joint_differ_where_sites_fail_together():
    # Each site is found for one key of two; were they independent, both would be for one key of four.
    assert per_layer([found("a", "b"), found()]) == Layers(mean=0.5, product=0.25, joint=0.5)
    assert per_layer([found("a"), found("b")]) == Layers(mean=0.5, product=0.25, joint=0.0)


def test_a_site_that_is_never_found_makes_the_product_nothing():
    assert per_layer([found("a"), found("a")]) == Layers(mean=0.5, product=0.0, joint=0.0)


def test_all_found():
    assert per_layer([found("a", "b")] * 3) == Layers(mean=1.0, product=1.0, joint=1.0)


def test_shares_are_over_keys_and_sites():
    three = [found("a", "b", "c", sites=4), found("a", "d", sites=4), found("a", "b", "d", "c", sites=4)]
    layers = per_layer(three)
    assert layers.mean == pytest.approx(9 / 12) and layers.joint == pytest.approx(1 / 3)
    assert layers.product == pytest.approx((2 / 3) ** 3)
