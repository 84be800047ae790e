"""Means over keys and examples against scipy's intervals, and the analysis of variance written out."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from deepenc.arena.estimates.sampled import UNEVEN, Sampled, crossed, of_shares, over_keys

VALUES = [0.31, 0.42, 0.40, 0.58, 0.35]


def test_over_keys_alone_it_is_student_s_interval_and_test():
    found = over_keys(VALUES)
    low, high = stats.t.interval(0.95, 4, np.mean(VALUES), stats.sem(VALUES))
    assert found.limits("free") == pytest.approx((low, high))
    shifted = over_keys([v - 0.3 for v in VALUES])
    assert shifted.p_value() == pytest.approx(stats.ttest_1samp(VALUES, 0.3).pvalue)


def test_of_one_key_it_is_the_normal_interval_over_examples():
    row = np.random.default_rng(0).random((1, 50))
    low, high = stats.norm.interval(0.95, row.mean(), stats.sem(row[0]))
    assert crossed(row).limits("free") == pytest.approx((low, high))


def test_components_are_those_of_the_analysis_of_variance():
    """Two keys and three examples, by hand."""
    table = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 10.0]])
    # Row means 3 and 5, column means 2, 2, 8, grand mean 4; residuals -+ 0, 1, -1 by column.
    between_keys = 3 * ((3 - 4) ** 2 + (5 - 4) ** 2) / 1
    between_examples = 2 * (4 + 4 + 16) / 2
    rest = 2 * (0 + 1 + 1) / 2
    found = crossed(table)
    assert found.mean == 4
    assert found.from_keys == pytest.approx(between_keys / 6)
    assert found.from_examples == pytest.approx((between_examples - rest) / 6)
    assert found.from_rest == pytest.approx(rest / 6)


def test_both_parts_are_added_in_quadrature_each_with_its_quantile():
    both = Sampled(0.0, 4, 0.04, 0.09)
    expected = np.hypot(stats.t.isf(0.025, 3) * 0.2, stats.norm.isf(0.025) * 0.3)
    assert both.reach(0.025) == pytest.approx(expected)


def test_the_variance_of_the_mean_is_estimated_without_bias():
    """Normal effects with known variances: the mean's variance is 4/3 + 9/8 + 1/24."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(4000):
        table = rng.normal(0, 2, (3, 1)) + rng.normal(0, 3, (1, 8)) + rng.normal(0, 1, (3, 8))
        found = crossed(table)
        made.append((found.mean, found.from_keys + found.from_examples))
    means, variances = np.array(made).T
    assert np.mean(variances) == pytest.approx(4 / 3 + 9 / 8 + 1 / 24, rel=0.06)
    assert means.var() == pytest.approx(4 / 3 + 9 / 8 + 1 / 24, rel=0.06)


@pytest.mark.parametrize("mean", [0.02, 0.5, 0.97])
def test_limits_of_a_share_are_students_on_the_logit_scale_with_uneven_tails(mean):
    found = Sampled(mean, 5, 0.0004)
    tilt = UNEVEN * (2 * mean - 1) * abs(2 * mean - 1)
    spread = 0.02 / (mean * (1 - mean))
    low = expit(logit(mean) - spread * stats.t.isf(0.025 * (1 - tilt), 4))
    high = expit(logit(mean) + spread * stats.t.isf(0.025 * (1 + tilt), 4))
    assert found.limits("share") == pytest.approx((low, high))
    assert (mean - low > high - mean) == (mean > 0.5) or mean == 0.5


@pytest.mark.parametrize("mean", [1e-6, 0.003, 0.5, 0.9999])
@pytest.mark.parametrize("spread", [1e-7, 1e-3, 0.2])
def test_a_share_stays_inside_its_ends(mean, spread):
    low, high = Sampled(mean, 3, spread**2, spread**2).limits("share")
    assert 0 <= low < mean < high <= 1


def test_the_tails_of_a_gain_are_uneven_and_it_has_no_ends():
    near_all, nothing = Sampled(0.98, 4, 0.01), Sampled(0.0, 4, 0.01)
    low, high = near_all.limits("gain")
    assert 0.98 - low > high - 0.98 and high > 1
    low, high = nothing.limits("gain")
    assert -low < high and low < 0


def test_a_one_sided_bound_is_at_least_the_plain_one():
    for mean in (0.05, 0.5, 0.95):
        found = Sampled(mean, 4, 0.01)
        assert found.at_most("gain") >= mean + 0.1 * stats.t.isf(0.05, 3) - 1e-9


def test_an_interval_at_the_p_value_just_meets_zero():
    found = Sampled(0.3, 4, 0.01, 0.02)
    assert found.upper(found.p_value() / 2, "free") > 0.3
    assert found.lower(found.p_value() / 2, "free") == pytest.approx(0, abs=1e-9)


def test_the_p_value_at_the_edges():
    assert Sampled(0.0, 4, 0.01).p_value() == 1
    assert Sampled(0.0, 4, 0.0).p_value() == 1
    assert Sampled(5.0, 2, 0.0, 1e-6).p_value() == 0


def test_counts_that_agree_by_accident_are_not_taken_for_certain():
    """Both keys have two of four right, on other examples."""
    found = crossed(np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]))
    assert found.from_keys == found.from_rest > 0


def test_half_an_example_stands_for_those_that_are_hardly_ever_wrong():
    table = np.ones((4, 100))
    table[0, 0] = table[1, 1] = 0
    assert crossed(table).from_examples == pytest.approx(0, abs=1e-18)
    assert of_shares(table).from_examples == pytest.approx(0.25 / 100**2)
    table[1, 1] = 1  # fewer still: no more than if all keys failed together
    assert of_shares(table).from_examples == pytest.approx(0.9975 * 0.0025 / 100)
    ordinary = np.random.default_rng(0).integers(0, 2, (1, 100)).repeat(4, 0).astype(float)
    assert of_shares(ordinary) == crossed(ordinary)
