"""What is printed of a mean over keys, and where nothing is."""

import numpy as np
import pytest
from scipy import stats

from deepenc.arena.estimates.estimate import AGREE, NEAR, TOO_FEW, estimated, unseen, wilson


def rows(keys, chance=0.9, examples=200, seed=0):
    return (np.random.default_rng(seed).random((keys, examples)) < chance).astype(float)


def of(table):
    return estimated(dict(enumerate(table.mean(axis=1))), table=table)


def test_one_key_has_wilson_s_interval_over_its_examples():
    table = rows(1)
    assert of(table).interval == wilson(int(table.sum()), 200)


def test_one_key_of_graded_outcomes_has_one_too():
    found = of(np.random.default_rng(0).random((1, 100)))
    assert found.interval.method == "examples"
    assert found.interval.low < found.mean < found.interval.high


def test_keys_that_are_the_same_on_every_example_count_as_one():
    table = rows(1).repeat(3, axis=0)
    assert of(table).interval == wilson(int(table[0].sum()), 200)


def test_all_right_under_all_keys_is_not_certain():
    found = of(np.ones((3, 50)))
    assert found.interval == wilson(50, 50) and found.interval.low < 0.95


@pytest.mark.parametrize("keys", [3, 5])
def test_keys_and_examples_both_make_the_interval(keys):
    found = of(rows(keys))
    assert found.interval.method == "crossed" and not found.lacks
    alone = estimated(dict(enumerate(rows(keys).mean(axis=1))))
    assert alone.interval.method == "keys"


def test_two_keys_that_differ_are_too_few():
    found = of(rows(2))
    assert (found.interval, found.lacks) == (None, TOO_FEW)
    assert estimated({0: 0.4}).lacks == TOO_FEW


def test_an_area_of_1_under_every_key_has_no_interval_and_says_so():
    found = estimated({0: 1.0, 1: 1.0, 2: 1.0})
    assert (found.mean, found.interval, found.lacks) == (1.0, None, AGREE)


def test_old_records_that_agree_are_over_their_examples():
    assert estimated({0: 0.2, 1: 0.2}, examples=100).interval == wilson(20, 100)


def test_a_reason_that_is_given_is_kept():
    found = estimated({0: 0.1, 1: 0.2, 2: 0.3}, "gain", lacks=NEAR)
    assert (found.interval, found.lacks) == (None, NEAR)


def test_the_worst_key_is_named_and_the_mean_is_over_keys():
    found = estimated({4: 0.1, 7: 0.9, 9: 0.5})
    assert (found.mean, found.least, found.most, found.worst_key, found.keys) == (0.5, 0.1, 0.9, 7, 3)
    assert estimated({}) is None


@pytest.mark.parametrize("keys", [1, 3, 20])
def test_what_keys_say_of_the_next_one_is_exact(keys):
    """Were a larger share worse, that many keys would all be better in fewer than 5 of 100 experiments."""
    share = unseen(keys)
    assert stats.binom.pmf(0, keys, share) == pytest.approx(0.05)


def test_what_keys_say_of_the_next_one_holds_in_simulated_experiments():
    rng = np.random.default_rng(0)
    worst = rng.random((20000, 5)).max(axis=1)  # the share of keys worse than the worst is 1 - worst
    assert np.mean(1 - worst <= unseen(5)) == pytest.approx(0.95, abs=0.006)
