"""Metrics against answers worked out by hand and against slow plain versions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepenc.arena.metrics import checked_scores, detection, independent, judge, most_suspect
from deepenc.errors import ClaimError
from deepenc.network.sites import Role, Site, Slot
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples


def site(name, width):
    return Site(name, width, (Slot(f"{name}.weight", 0, Role.INCOMING),))


class Fixed(nn.Module):
    """Answers with given outputs, in order."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.modes = []

    def forward(self, inputs):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return self.outputs[inputs[:, 0].long()]


TASK = Classification()


def images(labels):
    return Examples(torch.arange(len(labels), dtype=torch.float)[:, None], torch.tensor(labels))


def test_judge_counts_by_hand():
    outputs = torch.tensor([[0.1, 0.9], [2.0, 1.0], [0.0, 5.0], [1.0, 0.0], [0.0, 1.0]])
    found = judge(Fixed(outputs), images([1, 0, 0, 0, 1]), TASK, who="x", batch=2)
    assert (found.value, found.examples, found.unreadable) == (4 / 5, 5, 0)


def test_judge_is_in_eval_mode_without_gradients():
    network = Fixed(torch.zeros(3, 2)).train()
    judge(network, images([0, 1, 1]), TASK, who="x", batch=1)
    assert network.modes == [(False, False)] * 3


def test_nan_outputs_are_wrong_and_told():
    outputs = torch.tensor([[float("nan"), 0.0], [0.0, float("nan")], [1.0, 0.0]])
    found = judge(Fixed(outputs), images([0, 1, 0]), TASK, who="x")
    assert (found.value, found.unreadable) == (1 / 3, 2)


def test_infinite_outputs_still_name_a_class():
    outputs = torch.tensor([[float("inf"), 0.0], [0.0, float("-inf")]])
    assert judge(Fixed(outputs), images([0, 0]), TASK, who="x").value == 1


def test_top5_by_hand():
    """The class's place among eleven: 1st, 5th, 6th, 1st of ties, last of all ties, a NaN."""
    falling = [float(value) for value in range(11, 0, -1)]
    outputs = torch.tensor([falling] * 3 + [[0.0] * 11] * 2 + [[float("nan")] + [0.0] * 10])
    found = judge(Fixed(outputs), images([0, 4, 5, 0, 10, 1]), TASK, who="x", batch=4)
    assert (found.value, found.further, found.unreadable) == (2 / 6, {"top-5": 3 / 6}, 1)


@pytest.mark.parametrize(("classes", "counted"), [(5, False), (10, False), (11, True)])
def test_five_of_few_classes_say_nothing(classes, counted):
    found = judge(Fixed(torch.eye(classes)), images(list(range(classes))), TASK, who="x")
    assert found.further == ({"top-5": 1} if counted else {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=5), st.data())
def test_top5_against_a_plain_version(rows, data):
    labels = [data.draw(st.integers(0, 11)) for _ in rows]
    found = judge(Fixed(torch.tensor(rows, dtype=torch.float)), images(labels), TASK, who="x", batch=2)
    places = [
        sum(v > row[label] or (v == row[label] and c < label) for c, v in enumerate(row))
        for row, label in zip(rows, labels, strict=True)
    ]
    first, fifth = np.mean([[p == 0, p < 5] for p in places], axis=0)
    assert (found.value, found.further) == (first, {"top-5": fifth})


class Normalised(nn.Module):
    """One factor per class, behind a BatchNorm layer that a subclass may misuse."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.seen = 0

    def forward(self, inputs):
        return self.norm(inputs)


class OfItsBatch(Normalised):
    def forward(self, inputs):
        if len(inputs) > 1:
            return (inputs - inputs.mean(0)) / inputs.std(0)
        return inputs


class OfItsFirstBatch(Normalised):
    """Adapts once, to the first batch that it gets, and keeps it where no state dict shows it."""

    statistics = None

    def forward(self, inputs):
        if self.statistics is None and len(inputs) > 1:
            self.statistics = (inputs.mean(0), inputs.std(0))
        mean, deviation = self.statistics or (0, 1)
        return (inputs - mean) / deviation


class OfItsPast(Normalised):
    def forward(self, inputs):
        self.seen += len(inputs)
        return inputs * torch.linspace(1, 1 + self.seen, 3)


class AtRandom(Normalised):
    def forward(self, inputs):
        return inputs + torch.randn(inputs.shape)


class Keeping(Normalised):
    """Answers alike, and changes its own statistics all the same."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        self.norm.running_mean += 1e-9 * inputs.mean(0) + 1e-9
        return outputs


class WritesToItsInput(Normalised):
    def forward(self, inputs):
        return self.norm(inputs.sub_(5).mul_(2))


class HalfPrecise(Normalised):
    def forward(self, inputs):
        return (self.norm(inputs).bfloat16() + (len(inputs) > 1) * 2**-9).float()


def noise(count=300):
    generator = torch.Generator().manual_seed(0)
    return Examples(torch.randn(count, 3, generator=generator), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("network", [OfItsBatch, OfItsFirstBatch, OfItsPast, AtRandom])
def test_a_network_that_adapts_to_the_judges_images_is_refused(network):
    late = network()
    with pytest.raises(ClaimError, match=r"depends on that example alone.* of 1\d examples"):  # noqa: SIM117
        with independent(late, noise(), TASK, who="thief"):
            judge(late, noise(), TASK, who="thief")


def test_a_network_that_changes_itself_is_refused():
    network = Keeping()
    with pytest.raises(ClaimError, match=r"stays as it is.*norm.running_mean"):  # noqa: SIM117
        with independent(network, noise(), TASK, who="thief"):
            judge(network, noise(), TASK, who="thief")


@pytest.mark.parametrize("network", [Normalised, WritesToItsInput, HalfPrecise])
def test_other_networks_are_judged_and_the_images_stay(network):
    network, pictures = network(), noise()
    with independent(network, pictures, TASK, who="thief"):
        found = judge(network, pictures, TASK, who="thief")
    assert torch.equal(pictures.inputs, noise().inputs)
    assert judge(network, noise(), TASK, who="thief") == found


@pytest.mark.parametrize(
    "outputs", [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 2, dtype=torch.long), [1, 2]]
)
def test_judge_refuses_other_outputs(outputs):
    class Odd(nn.Module):
        def forward(self, inputs):
            return outputs

    with pytest.raises(ClaimError, match=r"'thief'.*\(2, 2\).*got"):
        judge(Odd(), images([0, 1]), Classification(classes=2), who="thief")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"b": torch.zeros(3)}, "sites \\['b'\\]"),
        ({"a": torch.zeros(3)}, r"\(4,\)"),
        ({"a": torch.zeros(4, 1)}, r"\(4,\)"),
        ({"a": [0.0] * 4}, "list"),
        ({"a": torch.tensor([0.0, 1.0, float("inf"), 2.0])}, "finite"),
        ([1], "by site name"),
    ],
)
def test_scores_of_wrong_form(scores, message):
    with pytest.raises(ClaimError, match=message):
        checked_scores(scores, [site("a", 4)], "thief")


def as_scores(sites, **values):
    tensors = {name: torch.tensor(v, dtype=torch.float) for name, v in values.items()}
    return checked_scores(tensors, sites, "x")


def test_perfect_scores():
    sites = [site("a", 5), site("b", 4)]
    found = detection(as_scores(sites, a=[0, 9, 0, 8, 1], b=[1, 2, 3, 7]), sites, {"a": (1, 3), "b": (3,)})
    assert (found.auc, found.average_precision, found.tpr) == (1, 1, 1)
    assert (found.exact_sites, found.sites, found.bits_left) == (2, 2, 0)
    assert found.bits == pytest.approx(math.log2(10) + math.log2(4))


def test_sites_need_not_be_comparable():
    """Site b's scores are all larger than a's: pooled as they are they would not separate."""
    sites = [site("a", 4), site("b", 4)]
    found = detection(as_scores(sites, a=[1, 0, 0, 0], b=[90, 90, 90, 99]), sites, {"a": (0,), "b": (3,)})
    assert found.auc == 1


def test_perfect_scores_at_sites_of_different_proportions():
    """One of 20 channels here, 10 of 20 there: shares of ranks would rank real ones above inserted ones."""
    sites = [site("a", 20), site("b", 20)]
    few, many = [0.0] * 19 + [1.0], [1.0] * 10 + [0.0] * 10
    found = detection(as_scores(sites, a=few, b=many), sites, {"a": (19,), "b": tuple(range(10))})
    assert (found.auc, found.average_precision, found.tpr) == (1, 1, 1)


def test_auc_compares_channels_of_one_site():
    """Site a: its one inserted channel wins 2 of 3 pairs; site b: its two win 1 of 2 pairs. 3 of 5."""
    sites = [site("a", 4), site("b", 3)]
    found = detection(as_scores(sites, a=[3, 1, 2, 4], b=[5, 1, 3]), sites, {"a": (0,), "b": (0, 1)})
    assert found.auc == pytest.approx(3 / 5)


def test_bits_left_by_hand():
    """The two confusion channels have ranks 1 and 4: four channels, two of them, C(4, 2) = 6."""
    sites = [site("a", 6)]
    found = detection(as_scores(sites, a=[9, 8, 7, 6, 5, 4]), sites, {"a": (0, 3)})
    assert found.bits_left == pytest.approx(math.log2(6))
    assert found.exact_sites == 0


def test_ties_count_against_the_attacker():
    sites = [site("a", 4)]
    found = detection(as_scores(sites, a=[1, 1, 0, 0]), sites, {"a": (0,)})
    assert found.bits_left == 1
    assert found.exact_sites == 0


def test_sites_left_out_are_constant_and_keep_all_bits():
    sites = [site("a", 5), site("b", 4)]
    found = detection(as_scores(sites, a=[9, 0, 0, 0, 0]), sites, {"a": (0,), "b": (2,)})
    assert found.bits_left == pytest.approx(2)
    constant = detection({}, sites, {"a": (0,), "b": (2,)})
    assert constant.auc == 0.5
    assert constant.bits_left == pytest.approx(constant.bits)


def test_without_confusion_channels_there_is_nothing_to_detect():
    assert detection({}, [site("a", 4)], {}) is None


def test_sites_without_confusion_channels_do_not_count():
    sites = [site("a", 4), site("b", 4)]
    found = detection(as_scores(sites, a=[9, 1, 2, 3], b=[9, 9, 9, 9]), sites, {"a": (0,)})
    assert (found.auc, found.sites) == (1, 1)


def test_tpr_at_one_percent_by_hand():
    """200 real channels, 4 inserted: two above all real ones, one below two, one below three of them."""
    values = [float(v) for v in range(200)] + [300.0, 301.0, 197.5, 196.5]
    sites = [site("a", 204)]
    found = detection(as_scores(sites, a=values), sites, {"a": (200, 201, 202, 203)})
    assert found.tpr == 0.75


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=7), st.data())
def test_auc_and_bits_against_plain_versions(values, data):
    width = len(values)
    count = data.draw(st.integers(1, width - 1))
    inserted = data.draw(st.sampled_from(list(itertools.combinations(range(width), count))))
    sites = [site("a", width)]
    found = detection(as_scores(sites, a=values), sites, {"a": inserted})
    pairs = [(values[f], values[r]) for f in inserted for r in set(range(width)) - set(inserted)]
    wins = [1.0 if f > r else 0.5 if f == r else 0.0 for f, r in pairs]
    assert found.auc == pytest.approx(sum(wins) / len(wins))
    tried = [c for c in range(width) if values[c] >= min(values[f] for f in inserted)]
    assert found.bits_left == pytest.approx(math.log2(len(list(itertools.combinations(tried, count)))))


def test_most_suspect_takes_what_the_configuration_says():
    scores = as_scores([site("a", 4), site("b", 3)], a=[0, 5, 1, 7], b=[1, 1, 0])
    assert most_suspect(scores, {"a": 2, "b": 1, "c": 9}) == {"a": (1, 3), "b": (0,)}
