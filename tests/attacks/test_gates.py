"""Learned gates: harm is gated away, the parts are what they should be, budgets are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.gates import Gates
from deepenc.arena.build import Encryption, Subject, build_case
from deepenc.arena.checks.planted import Alike, PlantedPlacement, planted_defense, random_subject
from deepenc.arena.duel import measure
from deepenc.arena.metrics import checked_scores
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.victim import Victim
from tests.attacks.fills import ruinous, same

CPU = torch.device("cpu")
BOTH = {"conv1": 1.0, "conv2": 1.0}


@pytest.mark.parametrize(
    "attack",
    [
        Gates(tie=0.03),
        Gates(tie=0.03, freeze_norms=False),
        Gates(form="sigmoid", lr=1, tie=0, damping=0.01),
        Gates(form="hard-concrete", lr=0.3, tie=0, damping=0.01),
    ],
    ids=["stored", "batch", "sigmoid", "hard-concrete"],
)
def test_harm_is_gated_away(plant, attack):
    planted = plant(ruinous, labelled=100)
    assert planted.accuracy(planted.case.encrypted) < 0.6
    claim = attack.attack(planted.case)
    assert planted.accuracy(claim.network) > 0.9
    assert np.mean(list(planted.auc(claim.scores).values())) >= 0.9


def test_harm_is_found(plant):
    planted = plant(ruinous, labelled=100)
    scores = Gates(keep="hard", tie=0, steps=120, batch_size=100).attack(planted.case).scores
    assert planted.auc(scores) == BOTH


def test_hard_gates_without_a_configuration_remove_what_is_below_the_threshold(plant):
    planted = plant(ruinous, labelled=100, allocation=False)
    claim = Gates(keep="hard", tie=0, steps=120, batch_size=100).attack(planted.case)
    assert planted.accuracy(claim.network) > 0.9
    assert claim.network.conv1.weight.shape[0] < 15 and claim.network.conv2.weight.shape[0] < 14


def test_hard_gates_with_a_configuration_are_scores_alone(plant):
    assert Gates(keep="hard", steps=2).attack(plant(labelled=8).case).network is None


def test_the_soft_network_is_the_gated_one(plant):
    case = plant(ruinous, labelled=20).case
    claim = Gates(steps=5).attack(case)
    gates = {name: -values.float() for name, values in claim.scores.items()}
    expected = case.encrypted.state_dict()
    by_hand = expected["conv2.weight"] * gates["conv1"][None, :, None, None]
    assert torch.allclose(claim.network.conv2.weight, by_hand)
    by_hand = expected["linear.weight"] * gates["conv2"].repeat_interleave(4)
    assert torch.allclose(claim.network.linear.weight, by_hand)
    assert torch.equal(claim.network.bn1.running_mean, expected["bn1.running_mean"])


def test_a_clean_network_is_not_lost(plant):
    clean = plant(positions={}, labelled=64)
    assert clean.accuracy(Gates().attack(clean.case).network) > 0.95


@pytest.mark.parametrize("objective", ["loss", "entropy", "statistics"])
def test_alike_channels_are_not_told_apart(objective):
    defense = Defense(name="alike", placement=PlantedPlacement(count=24), weights=Alike())
    encryption = Encryption.of(random_subject(64), defense, bytes(32))
    case = build_case(encryption, Threat(name="test", labelled=32, unlabelled=32), 1, 2, CPU)
    claim = Gates(objective=objective, steps=15).attack(case)
    auc = measure(claim, case, encryption, "test", 10).detection.auc
    assert 0.35 < auc < 0.65  # 72 among 96 channels: four deviations


@pytest.mark.parametrize("form", ["linear", "sigmoid", "hard-concrete"])
def test_gates_start_where_they_shall(plant, form):
    case = plant(labelled=8, steps=0).case
    claim = Gates(form=form, start=0.8).attack(case)
    assert same(claim.network, case.encrypted) and case.meter.samples == 0
    for values in claim.scores.values():
        assert torch.allclose(values, torch.full_like(values, -0.8))


def test_hard_concrete_gates_are_open_as_often_as_their_formula_says():
    attack, generator = Gates(form="hard-concrete"), torch.Generator().manual_seed(0)
    learned = torch.full((20000,), 0.5)
    drawn = attack._opened(learned, generator)
    # Louizos et al. 2018, equation 12
    odds = 1 / (1 + math.exp(-(0.5 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float((drawn > 0).float().mean()) == pytest.approx(odds, abs=0.01)
    assert float(attack._penalty({"a": drawn}, {"a": learned})) == pytest.approx(
        0.1 * float((1 - drawn).sum()), rel=1e-4
    )
    sparse = Gates(form="hard-concrete", sparsity=1, tie=0)
    assert float(sparse._penalty({"a": drawn}, {"a": learned})) == pytest.approx(20000 * odds, rel=1e-4)


def test_sparsity_lowers_all_gates(plant):
    case = plant(labelled=32).case
    loose, sparse = (Gates(sparsity=w, tie=0, steps=20).attack(case).scores for w in (0.0, 1.0))
    assert all(sparse[name].mean() > loose[name].mean() for name in loose)


@pytest.mark.parametrize(("budget", "steps", "samples"), [({"steps": 3}, 3, 48), ({"samples": 40}, 2, 32)])
def test_budgets_are_kept(plant, budget, steps, samples):
    case = plant(labelled=16, **budget).case
    with case.meter.running():
        Gates().attack(case)
    assert (case.meter.steps, case.meter.samples) == (steps, samples)


def test_samples_for_the_statistics_are_held_back(plant):
    case = plant(labelled=16, unlabelled=20, samples=70).case
    Gates(freeze_norms=False).attack(case)
    assert case.meter.samples == 2 * 16 + 36


@pytest.mark.parametrize("objective", ["loss", "entropy", "statistics"])
def test_two_images_or_one_class_are_enough(plant, objective):
    case = plant(labelled=2, unlabelled=2).case
    case.labelled.targets.zero_()
    attack = Gates(objective=objective, steps=3, freeze_norms=False)
    checked_scores(attack.attack(case).scores, case.sites, "test")
    assert (
        attack.needs.labelled == 2 * (objective == "loss")
        and attack.needs.unlabelled != attack.needs.labelled
    )


@pytest.mark.parametrize("objective", ["loss", "entropy", "statistics"])
def test_networks_without_batch_norm(plant, objective):
    case = plant(ruinous, labelled=8, unlabelled=8, positions={"conv2": (0, 8)}).case
    case.encrypted.bn1 = nn.Identity()
    sites = tuple(site for site in case.sites if site.name == "conv2")
    object.__setattr__(case, "sites", sites)
    claim = Gates(objective=objective, steps=3, tie=0, freeze_norms=False).attack(case)
    checked_scores(claim.scores, sites, "test")
    if objective != "entropy":  # whose slope is nothing where the predictions are sure
        assert same(claim.network, case.encrypted) == (objective == "statistics")


def test_a_broken_network_is_claimed_as_it_is(plant):
    case = plant(labelled=8).case
    with torch.no_grad():
        case.encrypted.linear.weight.fill_(torch.inf)
    claim = Gates().attack(case)
    checked_scores(claim.scores, case.sites, "test")
    assert claim.diverged and same(claim.network, case.encrypted)


class Attentive(nn.Module):
    """One attention, one hidden layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.up = nn.Linear(12, 20)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.up(x)).mean(1))


def test_attention_and_linear_sites_are_repaired():
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attentive().eval()
    inputs = 3 * torch.randn(600, 5, 3, generator=generator)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    parts = [Examples(inputs[part], labels[part]) for part in (slice(64), slice(64, 264), slice(264, 600))]
    subject = Subject.of(Victim("attentive", model, Classification(classes=4), *parts, "attentive"))
    assert any(site.contracted for site in subject.sites)
    encryption = Encryption.of(subject, planted_defense("damage"), bytes(32))
    case = build_case(encryption, Threat(name="test", labelled=200), 1, 2, CPU)
    with torch.no_grad():
        before = float((case.encrypted(parts[2].inputs).argmax(1) == parts[2].targets).float().mean())
    measured = measure(Gates(tie=0.01).attack(case), case, encryption, "test", None)
    assert measured.score.value > before + 0.5 * (1 - before)


@pytest.mark.parametrize("attack", [Gates(steps=3), Gates(steps=3, freeze_norms=False, form="hard-concrete")])
def test_the_case_stays_and_the_claim_repeats(plant, attack):
    case = plant(ruinous, labelled=20).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (attack.attack(case) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())
    assert same(first.network, second.network) and not first.network.training
    assert first.network.bn1.momentum == 0.1 and all(p.requires_grad for p in first.network.parameters())
