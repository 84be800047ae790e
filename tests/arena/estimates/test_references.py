"""Advantages and their intervals, from records with outcomes of single examples."""

import numpy as np
import pytest

from deepenc.arena.estimates.estimate import NEAR
from deepenc.arena.estimates.references import References, row, table
from deepenc.arena.estimates.sampled import crossed
from deepenc.arena.outcomes import pack
from deepenc.arena.record import Record, Score

RNG = np.random.default_rng(0)


def record(defense, attack, key, outcomes, reference=None, repeat=0, keep=True):
    outcomes = np.asarray(outcomes, dtype=float)
    score = Score(
        value=outcomes.mean(),
        examples=len(outcomes),
        outcomes=pack(outcomes[:, None]) if keep else None,
    )
    return Record(
        cell=f"{defense} {attack} {key} {repeat}", victim="v", defense=defense, attack=attack, threat="t",
        key=key, repeat=repeat, reference=reference, protected=defense != "null", state="done", score=score,
    )  # fmt: skip


def draws(chance, keys=4, examples=400):
    return (RNG.random((keys, examples)) < chance).astype(float)


def setting(chances=(0.5, 0.3, 0.95), **more):
    stolen, own, original = map(draws, chances)
    references = [
        *(record("null", "scratch", key, one, "scratch") for key, one in enumerate(own)),
        *(record("null", "null", key, original[0], "floor") for key in range(len(own))),
    ]
    attacks = [record("d", "a", key, one, **more) for key, one in enumerate(stolen)]
    return stolen, own, original[0], References(references), attacks


def test_the_interval_is_that_of_the_jackknife_over_examples_and_of_keys():
    """By another road: leave out each example in turn, and compute the advantage anew."""
    stolen, own, original, references, attacks = setting()
    found = references.advantages(attacks)
    assert found.interval.method == "crossed"

    def mean(columns):
        a, s, o = stolen[:, columns].mean(1), own[:, columns].mean(1), original[columns].mean()
        return ((a - s) / (o - s)).mean()

    every = np.arange(400)
    left = np.array([mean(np.delete(every, i)) for i in every])
    jackknife = 399 / 400 * ((left - left.mean()) ** 2).sum()
    assert found.mean == pytest.approx(mean(every))
    assert found.sampled.from_examples + found.sampled.from_rest == pytest.approx(jackknife, rel=0.03)
    by_key = [(a.mean() - s.mean()) / (original.mean() - s.mean()) for a, s in zip(stolen, own, strict=True)]
    assert found.sampled.from_keys == pytest.approx(np.var(by_key, ddof=1) / 4)


def test_an_attack_that_is_the_original_has_an_advantage_of_one_whatever_the_examples():
    _, _, original, references, _ = setting()
    found = references.advantages([record("d", "a", key, original) for key in range(3)])
    assert found.mean == 1 and found.interval is None
    assert found.sampled.from_keys == pytest.approx(0, abs=1e-20)


def test_references_that_are_too_near_have_no_interval():
    _, _, _, references, attacks = setting((0.5, 0.5, 0.56))
    known = [a for a in attacks if references.advantage(a) is not None]
    assert len(known) > 1
    assert references.advantages(known).lacks == NEAR


def test_without_outcomes_the_interval_is_over_keys():
    _, _, _, references, attacks = setting(keep=False)
    assert references.advantages(attacks).interval.method == "keys"


def test_repeats_of_a_key_are_one_row():
    first, second = draws(0.5, 2)
    members = {0: [record("d", "a", 0, first), record("d", "a", 0, second, repeat=1)]}
    assert table(members).tolist() == [((first + second) / 2).tolist()]
    assert crossed(table(members)).keys == 1


def test_a_score_that_is_no_mean_over_examples_has_no_row():
    found = record("d", "a", 0, [1, 0, 1, 1])
    assert row(found).tolist() == [1, 0, 1, 1]
    other = found.model_copy(update={"score": found.score.model_copy(update={"value": 0.5})})
    assert row(other) is None


def test_keys_judged_on_different_examples_make_no_table():
    assert table({0: [record("d", "a", 0, [1, 0])], 1: [record("d", "a", 1, [1, 0, 1])]}) is None


def test_damage_is_per_example():
    _, _, original, references, attacks = setting()
    lost = references.damage(attacks[2])
    assert lost.mean() == pytest.approx(original.mean() - attacks[2].score.value)
