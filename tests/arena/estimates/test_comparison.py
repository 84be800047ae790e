"""Comparisons of defenses and attacks whose true order is known."""

import numpy as np
import pytest
from scipy import stats

from deepenc.arena.estimates.comparison import compared, holm, of_attacks, of_defenses, ties
from deepenc.arena.estimates.estimate import TOO_FEW
from deepenc.arena.outcomes import pack
from deepenc.arena.record import Record, Score


def record(defense, attack, key, outcomes, repeat=0, keep=True, **more):
    outcomes = np.asarray(outcomes, dtype=float)
    packed = pack(outcomes[:, None]) if keep else None
    return Record(
        cell=f"{defense} {attack} {key} {repeat}", victim="v", defense=defense, attack=attack, threat="t",
        key=key, repeat=repeat, protected=True, state="done",
        score=Score(value=outcomes.mean(), examples=len(outcomes), outcomes=packed), **more,
    )  # fmt: skip


def drawn(chance, keys=5, seed=0, examples=300):
    return (np.random.default_rng(seed).random((keys, examples)) < chance).astype(float)


def pairs(defense, table, **more):
    return {(key, 0): record(defense, "a", key, one, **more) for key, one in enumerate(table)}


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_without_outcomes_it_is_student_s_paired_test():
    one, other = drawn(0.6), drawn(0.5, seed=1)
    difference, interval, p, keys = compared(pairs("a", one, keep=False), pairs("b", other, keep=False))
    expected = stats.ttest_rel(one.mean(axis=1), other.mean(axis=1))
    low, high = expected.confidence_interval()
    assert (difference, p, keys) == (
        pytest.approx((one - other).mean()),
        pytest.approx(expected.pvalue),
        5,
    )
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_pairing_by_example_takes_out_what_is_hard_for_both():
    """Both fail on the same examples, so that the difference is known better than either score."""
    hard = np.random.default_rng(2).random((1, 300)) < 0.5
    first, second = hard & (drawn(0.95) > 0), hard & (drawn(0.9, seed=5) > 0)
    _, interval, _, _ = compared(pairs("a", first.astype(float)), pairs("b", second.astype(float)))
    alone, _, _, _ = compared(pairs("a", first.astype(float)), pairs("b", np.zeros((5, 300)))), 0, 0, 0
    assert interval.high - interval.low < (alone[1].high - alone[1].low) / 2


def test_a_difference_is_told_and_the_higher_is_named_first():
    better, worse = pairs("tight", drawn(0.2)), pairs("loose", drawn(0.7, seed=1))
    ((found,),) = of_defenses([*better.values(), *worse.values()])
    assert (found.first, found.second, found.keys) == ("loose", "tight", 5)
    assert found.told_apart and found.verdict == "apart" and found.interval.low > 0.3
    assert found.adjusted == found.p


def test_what_is_the_same_is_equal_and_what_hardly_differs_a_tie():
    table = drawn(0.5)
    ((same,),) = of_defenses([*pairs("a", table).values(), *pairs("b", table).values()])
    assert (same.verdict, same.p, same.difference) == ("equal", 1.0, 0.0)
    ((near,),) = of_defenses([*pairs("a", table).values(), *pairs("b", drawn(0.5, seed=3)).values()])
    assert near.verdict == "tie"


@pytest.mark.parametrize("keys", [1, 2])
def test_few_keys_compare_nothing(keys):
    ((found,),) = of_defenses(
        [*pairs("a", drawn(0.1, keys)).values(), *pairs("b", drawn(0.9, keys)).values()]
    )
    assert (found.verdict, found.p, found.interval, found.adjusted) == (TOO_FEW, None, None, None)


def test_equal_differences_of_all_keys_are_no_certainty():
    """One more example under each of three keys, without outcomes: nothing tells how much chance is in it."""
    one, other = np.zeros((3, 50)), np.zeros((3, 50))
    one[:, 0] = 1
    ((found,),) = of_defenses(
        [*pairs("a", one, keep=False).values(), *pairs("b", other, keep=False).values()]
    )
    assert not found.told_apart and found.p is None


def test_defenses_are_compared_by_their_strongest_attack_on_each_key():
    weak, strong = drawn(0.1), drawn(0.8, seed=1)
    records = [record("a", "weak", key, one) for key, one in enumerate(weak)]
    records += [record("a", "strong", key, one) for key, one in enumerate(strong)]
    records += [record("b", "weak", key, one) for key, one in enumerate(drawn(0.4, seed=2))]
    ((found,),) = of_defenses(records)
    assert found.first == "a" and found.difference == pytest.approx(0.4, abs=0.05)


def test_attacks_are_paired_by_key_and_repeat_and_corrected_for_all_pairs():
    records = [
        record("d", name, key, drawn(chance, 1, seed=10 * place + 100 * key + repeat)[0], repeat)
        for place, (name, chance) in enumerate({"x": 0.3, "y": 0.5, "z": 0.8}.items())
        for key in range(4)
        for repeat in (0, 1)
    ]
    records.append(record("d", "own", 0, [1, 1], reference="scratch"))
    (family,) = of_attacks(records)
    assert {(one.first, one.second) for one in family} == {("y", "x"), ("z", "x"), ("z", "y")}
    assert all(one.keys == 4 for one in family), "repeats are no keys"
    least = min(family, key=lambda one: one.p)
    assert least.adjusted == pytest.approx(3 * least.p)


def test_defenses_that_cannot_be_told_from_the_best_are_marked():
    records = []
    for place, (name, chance) in enumerate({"one": 0.3, "two": 0.3, "bad": 0.9}.items()):
        records += pairs(name, drawn(chance, seed=place)).values()
    marks = ties(records)
    assert sorted(marks.values()) == ["best", "tie"]
    assert {defense for _, defense, _ in marks} == {"one", "two"}
    assert ties(list(pairs("alone", drawn(0.3)).values())) == {}


def test_keys_that_only_one_was_measured_on_do_not_count():
    found = compared(pairs("a", drawn(0.5)), {(9, 0): record("b", "a", 9, [1.0, 0.0])})
    assert found is None
