"""Budgets are counted and held; a point of a curve differs from its threat model in one number."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from deepenc.arena.threat import Meter, Needs, Threat, close, point
from deepenc.errors import ClaimError, OutOfBudget

THIEF = Threat(name="thief", labelled=500, steps=80)


def test_a_point_differs_in_one_budget_and_in_its_name():
    at = THIEF.at("labelled", 50)
    assert (at.labelled, at.steps, at.name, at.family) == (50, 80, "thief labelled=50", "thief")
    again = at.at("steps", 3)
    assert (again.labelled, again.steps, again.family) == (50, 3, "thief")


@pytest.mark.parametrize(("budget", "value"), [("labelled", -1), ("key_fraction", 1.5), ("steps", 2.5)])
def test_a_point_outside_its_range_is_refused(budget, value):
    with pytest.raises(ValidationError, match=budget):
        THIEF.at(budget, value)


def test_points_are_read_back_from_names():
    assert point(THIEF.at("key_fraction", 0.25).name) == ("thief", "key_fraction", 0.25)
    for name in ("thief", "thief labelled", "a thief's=5", "labelled=5", "thief size=5"):
        assert point(name) is None


def test_all_that_is_spent_is_counted_and_limited():
    meter = Meter(Threat(name="t", samples=10, steps=2, oracle=5, trials=1))
    meter.charge(samples=10, steps=2, queries=5)
    assert (meter.left("samples"), meter.left("queries"), meter.left("trials")) == (0, 0, 1)
    for what in ("samples", "steps", "queries"):
        with pytest.raises(OutOfBudget, match=f"{what}; the attack asked for"):
            meter.charge(**{what: 1})
    meter.charge(trials=1)
    with pytest.raises(OutOfBudget, match="allows 1 trials; the attack asked for 2"):
        meter.charge(trials=1)


def test_queries_and_trials_must_be_allowed_samples_and_steps_need_not():
    meter = Meter(Threat(name="t"))
    meter.charge(samples=10**6, steps=10**6)
    assert meter.left("samples") is None and meter.left("queries") == 0
    with pytest.raises(OutOfBudget):
        meter.charge(queries=1)


def test_what_is_refused_is_not_charged():
    meter = Meter(Threat(name="t", samples=5, oracle=5))
    with pytest.raises(OutOfBudget):
        meter.charge(samples=3, queries=6)
    assert (meter.samples, meter.queries) == (0, 0)


def test_what_is_spent_cannot_be_written():
    meter = Meter(Threat(name="t", samples=5, trials=3))
    meter.charge(samples=5)
    for what in ("samples", "steps", "seconds", "threat", "closed"):
        with pytest.raises(AttributeError):
            setattr(meter, what, 0)
    with pytest.raises(ClaimError, match="charge >= 0, got -5 samples"):
        meter.charge(samples=-5)
    assert (meter.samples, meter.left("samples"), copy.deepcopy(meter)) == (5, 0, meter)
    close(meter)
    meter.charge(samples=9)
    assert meter.samples == 5


def test_limits_may_be_nested_and_end_with_what_they_are_for():
    meter = Meter(Threat(name="t", samples=10))
    meter.charge(samples=2)
    with meter.limited(samples=5, steps=1, trials=None):
        assert (meter.left("samples"), meter.left("steps"), meter.left("trials")) == (5, 1, 0)
        meter.charge(samples=1)
        with meter.limited(samples=50):
            assert meter.left("samples") == 4
            with pytest.raises(OutOfBudget, match="allows 7 samples; the attack asked for 8"):
                meter.charge(samples=5)
        with pytest.raises(OutOfBudget), meter.limited(samples=1):
            meter.charge(samples=2)
        meter.charge(samples=4)
    assert (meter.left("samples"), meter.left("steps")) == (3, None)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)

    def forward(self, images):
        if images.isnan().any():
            raise ValueError("planted")
        return self.head(self.body(self.stem(images)))


def test_whole_networks_and_single_layers_are_counted_copies_too():
    meter, images = Meter(Threat(name="t")), torch.zeros(8, 4)
    network = meter.watch(Backbone())
    network(images)
    copy.deepcopy(network)(images=images[:5])
    assert meter.samples == 13
    # As a feature extractor does: every layer has seen the eight images once.
    network.head(network.body(network.stem(images)))
    assert meter.samples == 13 + 8
    copy.deepcopy(network).body[0](images[:3])
    assert meter.samples == 13 + 8 + 3
    # A forward that fails is over all the same.
    with pytest.raises(ValueError, match="planted"):
        network(images / 0)
    network.stem(images)
    assert meter.samples == 13 + 8 + 3 + 8 + 5


def test_single_layers_stop_at_the_budget():
    network = Meter(Threat(name="t", samples=0)).watch(Backbone())
    with pytest.raises(OutOfBudget):
        network.stem(torch.zeros(8, 4))


def test_needs_name_what_is_missing():
    needs = Needs(public_checkpoint=True, releases=2, oracle=100).union(Needs(trials=5, releases=1))
    assert needs.missing(Threat(name="t", oracle=10)) == [
        "public_checkpoint",
        "releases >= 2 (given 0)",
        "oracle >= 100 (given 10)",
        "trials >= 5 (given 0)",
    ]
