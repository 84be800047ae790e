"""Statistics against scipy, statsmodels' formula written out, and records made by hand."""

import math

import pytest

from deepenc.arena.estimates.estimate import wilson
from deepenc.arena.estimates.references import References, advantage
from deepenc.arena.estimates.summaries import Layers, per_layer, summarise, worst
from deepenc.arena.record import Cost, Detection, Record, Score


def record(defense, attack, correct, key=0, repeat=0, *, reference=None, state="done", threat="t", **more):
    return Record(
        cell=f"{defense}-{attack}-{key}-{repeat}-{threat}",
        victim="v",
        defense=defense,
        attack=attack,
        threat=threat,
        key=key,
        repeat=repeat,
        reference=reference,
        protected=defense != "null",
        state=state,
        score=None if correct is None else Score(value=correct / 100, examples=100),
        **more,
    )


def references(keys=2, scratch=(20, 40)):
    return [record("null", "nothing", 90, k, reference="floor") for k in range(keys)] + [
        record("null", "own", scratch[k], k, reference="scratch") for k in range(keys)
    ]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (37, 100), (5991, 6000)])
def test_wilson_against_the_formula(k, n):
    z = 1.959963984540054
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(k, n)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert found.method == "examples"


@pytest.mark.parametrize(
    ("attack", "scratch", "original", "expected"),
    [
        (0.9, 0.3, 0.9, 1),
        (0.3, 0.3, 0.9, 0),
        (0.0, 0.3, 0.9, -0.5),
        (0.5, None, 0.9, None),
        (0.5, 0.3, None, None),
        (0.5, 0.9, 0.9, None),
        (0.5, 0.95, 0.9, None),
    ],
)
def test_advantage_by_hand(attack, scratch, original, expected):
    assert advantage(attack, scratch, original) == expected


def test_advantage_pairs_scratch_of_the_same_key():
    found = summarise([*references(), record("d", "a", 55, 0), record("d", "a", 65, 1)])[-1]
    # Key 0: (55 - 20) / 70 = 0.5; key 1: (65 - 40) / 50 = 0.5.
    assert (found.advantage.mean, found.advantage.least, found.advantage.most) == (0.5, 0.5, 0.5)


def test_a_missing_pair_takes_the_mean_of_the_references():
    known = References(references())
    lonely = record("d", "a", 60, key=7)
    assert known.rate("scratch", lonely) == pytest.approx(0.3)
    assert known.advantage(lonely) == 0.5


def test_references_are_of_the_same_threat():
    assert References(references()).advantage(record("d", "a", 60, threat="other")) is None


def test_of_two_scratch_attacks_the_better_counts():
    more = [record("null", "own2", 60, 0, reference="scratch")]
    assert References([*references(), *more]).rate("scratch", record("d", "a", 1, 0)) == 0.6


def test_only_the_null_defense_gives_references():
    stray = record("d", "nothing", 99, 0, reference="floor")
    assert References([stray]).rate("floor", record("d", "a", 1, 0)) is None


def test_accuracy_of_records_without_outcomes_is_over_keys_and_its_worst_key_named():
    records = [record("d", "a", c, k) for k, c in enumerate((10, 90, 50))]
    (found,) = summarise(records)
    estimate = found.score
    assert (estimate.mean, estimate.least, estimate.most) == (0.5, 0.1, 0.9)
    assert (estimate.worst_key, estimate.keys, estimate.interval.method) == (1, 3, "keys")


def test_repeats_do_not_count_as_keys():
    (found,) = summarise([record("d", "a", c, 0, r) for r, c in enumerate((10, 20, 30))])
    assert found.score.keys == 1
    assert found.score.mean == pytest.approx(0.2)
    assert found.score.interval == wilson(20, 100)


def test_unfinished_duels_are_absent_not_zero():
    records = [
        record("d", "a", 50, 0),
        record("d", "a", None, 1, state="failed", reason="boom"),
        record("d", "a", None, 2, state="out_of_budget", reason="too much"),
    ]
    (found,) = summarise(records)
    assert dict(found.states) == {"done": 1, "failed": 1, "out_of_budget": 1}
    assert (found.score.mean, found.score.keys, found.reason) == (0.5, 1, "boom")
    (nothing,) = summarise([record("d", "b", None, state="unsupported", reason="r")])
    assert (nothing.score, nothing.advantage, nothing.detection, nothing.cost) == (None,) * 4


def test_worst_attack_is_taken_per_key():
    """Neither attack is best on both keys: the mean of the better ones is above either's mean."""
    records = [
        *references(2, (10, 10)),
        *(record("d", "a", c, k) for k, c in enumerate((80, 20))),
        *(record("d", "b", c, k) for k, c in enumerate((30, 70))),
        *(record("d", "c", None, k, state="failed", reason="x") for k in (0, 1)),
        record("d", "own", 99, 0, reference="scratch"),
    ]
    (found,) = worst(records)
    assert found.score.mean == 0.75
    assert dict(found.attacks) == {"a": 1, "b": 1}
    assert found.missing == 2
    assert found.advantage.mean == pytest.approx((70 / 80 + 60 / 80) / 2)


def test_detection_and_cost_means():
    def scored(key, auc, left):
        quality = Detection(
            auc=auc, average_precision=auc, tpr=0, exact_sites=1, sites=4, bits_left=left, bits=10
        )
        return record("d", "a", None, key, detection=quality, cost=Cost(samples=key, steps=2, seconds=1))

    (found,) = summarise([scored(0, 0.5, 8), scored(1, 1.0, 2)])
    assert found.detection.auc.mean == 0.75
    assert found.detection.exact.mean == 0.25
    assert (found.detection.bits_left.least, found.detection.bits) == (2, 10)
    assert (found.cost.samples, found.cost.steps) == (0.5, 2)
    assert found.score is None


def test_keys_that_a_dear_attack_did_not_meet_do_not_count_as_safer():
    cheap = [record("d", "cheap", 30, k) for k in range(4)]
    dear = [record("d", "dear", correct, k) for k, correct in enumerate((80, 70))]
    (found,) = worst([*references(4, (20,) * 4), *cheap, *dear])
    assert found.score.keys == 2 and found.score.mean == 0.75
    assert found.attacks == {"dear": 2}


# The paper's p^L, worked out by hand.


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
