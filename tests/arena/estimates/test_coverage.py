"""A smaller run of `benchmarks/coverage.py`: printed intervals cover, and equal defenses are not told apart.

An interval fails where what was seen would happen in fewer than 1 of 10,000 studies of one that covers 93 %;
or, where 97 % need not be exceeded, in as few of one that covers 97 %. The draws are always the same.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from scipy.stats import binom

SIMULATIONS, EXAMPLES, RARE = 400, 300, 1e-4

PATH = Path(__file__).parents[3] / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("coverage_study", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def named(kinds, name):
    (found,) = [kind for kind in kinds if kind.name == name]
    return found


ACCURACIES = (
    "ordinary",
    "keys far apart",
    "heavy-tailed (t, 3 degrees)",
    "skewed (lognormal losses)",
    "all keys equal, 97 %",
    "all keys the same, 97 %",
    "chance, keys differ",
    "nearly all right, 99.8 %",
)


def check(row, conservative=False):
    hits, printed = round(row.coverage * row.printed * SIMULATIONS), round(row.printed * SIMULATIONS)
    assert binom.cdf(hits, printed, 0.93) > RARE, row
    assert conservative or binom.sf(hits - 1, printed, 0.97) > RARE, row


@pytest.mark.parametrize("keys", [3, 10])
@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracies_are_covered(study, name, keys):
    row = study.measured(named(study.crossed_kinds(), name), keys, SIMULATIONS, EXAMPLES)
    check(row, conservative=keys == 3)  # of the keys' variance little is known
    assert row.printed > 0.8


@pytest.mark.parametrize("keys", [5, 20])
@pytest.mark.parametrize(
    "name", ["AUC about 0.6", "AUC near 1", "AUC near 1, heavy-tailed", "AUC 1 for half of the keys"]
)
def test_areas_are_covered(study, name, keys):
    check(study.measured(named(study.key_kinds(), name), keys, SIMULATIONS, EXAMPLES))


@pytest.mark.parametrize("name", ["advantage: half", "advantage: nearly all", "advantage: nothing"])
def test_advantages_are_covered(study, name):
    check(study.measured(named(study.advantage_kinds(), name), 5, SIMULATIONS, EXAMPLES))


def test_of_two_keys_only_those_that_are_the_same_have_an_interval(study):
    kinds = study.crossed_kinds()
    for kind in kinds:
        row = study.measured(kind, 2, 50, EXAMPLES)
        if kind.name == "all keys the same, 97 %":
            assert row.printed == 1
        elif "nearly" not in kind.name:
            assert row.printed < 0.2, row


@pytest.mark.parametrize("keys", [3, 5])
def test_a_defense_is_seldom_told_apart_from_itself(study, keys):
    for draw in study.NULLS.values():
        assert study.null_experiment(draw, keys, 200, EXAMPLES) <= 0.05


def test_a_narrower_interval_would_be_noticed(study, monkeypatch):
    """The percentile bootstrap that was printed once covers about 75 % over three keys."""
    import deepenc.arena.estimates.sampled as sampled

    monkeypatch.setattr(sampled.Sampled, "reach", lambda self, tail: 1.6 * self.from_keys**0.5)
    row = study.measured(named(study.crossed_kinds(), "ordinary"), 3, SIMULATIONS, EXAMPLES)
    with pytest.raises(AssertionError):
        check(row)
