"""Peeling: harmful channels are found from the statistics behind them, and nothing where nothing is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from attacks.peel import Peel, peeled, suspicion, swapped
from deepenc.analysis.batchnorm import Moments
from deepenc.analysis.consistency import Evidence, verify
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import PlantedPlacement, PlantedWeights, planted_subject
from deepenc.arena.checks.selftest import selftest
from deepenc.arena.duel import measure
from deepenc.arena.metrics import checked_scores
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import ClaimError, OutOfBudget

CPU = torch.device("cpu")


def damaged(*, seed=1, count=4, **threat):
    """A case of confusion channels that do great harm, and what its attacker does not see."""
    placement, weights = PlantedPlacement(count=count), PlantedWeights(weakness="damage")
    defense = Defense(name="damage", placement=placement, weights=weights)
    encryption = Encryption.of(planted_subject(64), defense, bytes([seed]) * 32)
    model = Threat(name="test", **({"unlabelled": 64} | threat))
    return build_case(encryption, model, 3, 4, CPU), encryption


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("images", [16, 64])
def test_harmful_channels_are_found_and_the_victim_comes_back(seed, images):
    case, encryption = damaged(seed=seed)
    claim = Peel(images=images).attack(case)
    measured = measure(claim, case, encryption, "peel", None)
    assert measured.detection.auc >= 0.99
    assert measured.score.value > (0.9 if images == 64 else 0.8)
    assert case.meter.samples == images + 2


def test_the_rows_behind_tell_by_themselves():
    case, encryption = damaged(seed=2)
    scores = Peel(own=0.0, images=64).attack(case).scores
    for name in ("conv1", "conv2"):  # behind conv3 comes no BatchNorm
        chosen = scores[name].topk(4).indices.sort().values.tolist()
        assert chosen == list(encryption.key.positions[name])


def test_the_selftest_is_passed():
    assert selftest(Peel()) is None


def test_the_true_key_of_a_site_is_the_most_plausible():
    case, encryption = damaged()
    site = case.sites[0]
    key = encryption.key.positions[site.name]
    true = verify(case.encrypted, site, key, case.unlabelled.inputs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.randperm(site.width, generator=generator)[: len(key)].tolist()
        assert verify(case.encrypted, site, other, case.unlabelled.inputs) > true
    one_off = (*key[1:], next(c for c in range(site.width) if c not in key))
    assert verify(case.encrypted, site, one_off, case.unlabelled.inputs) > true


def evidence(contributions):
    """Rows of which only the means tell: the stored ones are those of channels 0 and 1 alone."""
    first = torch.tensor(contributions, dtype=torch.float64)
    rows, width = first.shape
    return Evidence(
        first=torch.cat([first, first.new_zeros(rows, 1)], 1),
        second=torch.zeros(rows, width + 1, width + 1, dtype=torch.float64),
        bias=first.new_zeros(rows),
        stored=Moments(first[:, :2].sum(1), first.new_ones(rows)),
        own=first.new_zeros(width),
        eps=first.new_full((rows,), 1e12),  # both deviations are alike
    )


def test_swaps_mend_what_greed_spoils():
    # Channels 2 and 3 are confusion: 3 and 2 cancel but for 1, so that greed takes 0 first: 4 - 3 of 1.
    made = evidence([[1.0, 1.0, 5.0, -4.0], [1.0, 0.0, 0.5, 0.5]])
    greedy = torch.tensor([False, True, True, False])
    kept = swapped(made, greedy, 10)
    assert kept.tolist() == [True, True, False, False]
    assert torch.equal(swapped(made, greedy, 0), greedy)
    assert swapped(made, kept, 10).equal(kept)


def test_greed_takes_the_worst_first():
    made = evidence([[1.0, 1.0, 5.0, 0.5]])
    assert peeled(made, 1).tolist() == [True, True, False, True]
    assert peeled(made, 2).tolist() == [True, True, False, False]
    assert int(peeled(made, 9).sum()) == 1  # a channel stays
    scores = suspicion(made, peeled(made, 2))
    assert scores.argsort(descending=True).tolist()[:2] == [2, 3]
    wrong = torch.tensor([True, False, True, True])  # whatever is removed comes first
    assert int(suspicion(made, wrong).argmax()) == 1


def test_sites_without_a_batch_norm_are_not_scored(plant):
    planted = plant(unlabelled=8)
    assert set(Peel(images=8).attack(planted.case).scores) == {"conv1"}
    planted.case.encrypted.bn1 = nn.Identity()
    assert Peel(images=8).attack(planted.case).scores == {}


def test_nothing_to_find_removes_nothing():
    case, _ = damaged()
    case = type(case)(**{**vars(case), "allocation": {}})
    scores = Peel(images=8).attack(case).scores
    checked_scores(scores, case.sites, "peel")
    assert all(math.isfinite(float(s.sum())) for s in scores.values())


def test_without_the_configuration_it_says_what_it_needs():
    case, _ = damaged(allocation=False)
    assert Peel().needs.missing(case.threat)
    with pytest.raises(ClaimError, match="allocation"):
        Peel(images=8).attack(case)


def test_over_budget_it_is_stopped_and_leaves_nothing_behind():
    case, _ = damaged(samples=20)
    before = [len(m._forward_hooks) for m in case.encrypted.modules()]  # the meter's
    with pytest.raises(OutOfBudget):
        Peel(images=32).attack(case)
    assert [len(m._forward_hooks) for m in case.encrypted.modules()] == before


def test_the_case_stays_and_the_claim_repeats():
    case, _ = damaged()
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    first, second = (Peel(images=8).attack(case).scores for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.encrypted.state_dict().items())
