"""Attacks in a row: what goes from one to the next, and what comes out."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from attacks.chain import Chain
from attacks.collisions import Collisions
from attacks.finetune import Finetune
from attacks.null import Null
from attacks.partial_key import PartialKey
from attacks.recalibrate import Recalibrate
from deepenc.arena.case import Attack, Claim
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError, OutOfBudget
from deepenc.network.sites import Role

KEY = {"conv1": (1, 4, 9), "conv2": (0, 8)}


class Told(Attack):
    """Suspects given channels, those named first the most, whatever the case."""

    name: ClassVar[str] = "told"
    conv1: tuple[int, ...] = (9, 1, 4)
    conv2: tuple[int, ...] = (8, 0)

    def attack(self, case):
        scores = {site.name: torch.zeros(site.width) for site in case.sites}
        for name, score in scores.items():
            for rank, channel in enumerate(getattr(self, name)):
                score[channel] = 10 - rank
        return Claim(scores=scores)


seen: list[Any] = []


class Watch(Attack):
    """Keeps the case it gets, and claims its network, or nothing."""

    name: ClassVar[str] = "watch"
    claims: bool = True

    def attack(self, case):
        seen.append(case)
        return Claim(network=case.copy() if self.claims else None)


class Quiet(Attack):
    """Claims scores of nothing."""

    name: ClassVar[str] = "quiet"

    def attack(self, case):
        return Claim(scores={})


class Silent(Attack):
    """A network that says 0."""

    name: ClassVar[str] = "silent"

    def attack(self, case):
        return Claim(network=nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


def same(network, other):
    expected = other.state_dict()
    return all(torch.equal(t, expected[n]) for n, t in network.state_dict().items())


def copied(slot, shape, victim, generator):
    """Weights drawn from the victim's own."""
    if slot.role in (Role.MEAN, Role.VARIANCE):
        return victim.mean().expand(shape)
    return victim.flatten()[torch.randint(victim.numel(), shape, generator=generator)]


def test_scores_are_followed_by_removal(plant):
    planted = plant(known=KEY)
    claim = Chain(stages=[Told(), Watch()]).attack(planted.case)
    assert same(claim.network, planted.original)
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}
    (case,) = seen
    assert {site.name: site.width for site in case.sites} == {"conv1": 12, "conv2": 12}
    assert case.allocation == {"conv1": 0, "conv2": 0} and case.known == {}
    assert case.meter is planted.case.meter


def test_detection_removal_and_finetuning_solve_a_planted_case(plant):
    planted = plant(copied, labelled=100)
    claim = Chain(stages=["collisions", {"name": "finetune", "steps": 10, "lr": 0.01}]).attack(planted.case)
    assert planted.accuracy(claim.network) > 0.95
    assert claim.network.conv1.weight.shape[0] == 12
    assert min(planted.auc(claim.scores).values()) >= 0.99


def test_two_detectors_remove_twice_and_the_first_scores_are_claimed(plant):
    planted = plant()
    claim = Chain(stages=[Told(), Told(conv1=(3,), conv2=(2,))], excess=2).attack(planted.case)
    # First 6 of 15 and 4 of 14; then nothing of a allocation of 0.
    assert claim.network.conv1.weight.shape[0] == 9 and claim.network.conv2.weight.shape[0] == 10
    assert claim.scores["conv1"].shape == (15,) and claim.scores["conv1"].argmax() == 9


@pytest.mark.parametrize(("excess", "widths"), [(1, (12, 12)), (1.5, (10, 11)), (2, (9, 10)), (100, (1, 1))])
def test_more_can_be_removed_than_was_inserted(plant, excess, widths):
    claim = Chain(stages=[Told()], excess=excess).attack(plant().case)
    assert (claim.network.conv1.weight.shape[0], claim.network.conv2.weight.shape[0]) == widths


@pytest.mark.parametrize(("fraction", "widths"), [(0.2, (12, 11)), (0.001, (14, 13)), (0.99, (1, 1))])
def test_without_the_configuration_a_share_is_removed(plant, fraction, widths):
    attack = Chain(stages=[Told(), Watch()], fraction=fraction)
    claim = attack.attack(plant(allocation=False).case)
    assert (claim.network.conv1.weight.shape[0], claim.network.conv2.weight.shape[0]) == widths
    assert seen[0].allocation is None


def test_a_site_without_confusion_channels_is_left_alone(plant):
    planted = plant(positions={"conv1": (1, 4, 9), "conv2": ()})
    claim = Chain(stages=[Told()]).attack(planted.case)
    assert same(claim.network, planted.original)


def test_networks_go_on_to_the_next_stage(plant):
    planted = plant(labelled=40, unlabelled=32)
    case = planted.case
    claim = Chain(stages=["recalibrate", Watch(), Finetune(steps=5), Told(), Watch()]).attack(case)
    assert same(seen[0].encrypted, Recalibrate().attack(plant(labelled=40, unlabelled=32).case).network)
    assert seen[0].sites == case.sites and seen[0].allocation == case.allocation
    # Told after training: removed from the trained network.
    trained = Finetune(steps=5).attack(seen[0]).network
    assert same(claim.network, case.remove(KEY, trained))
    assert planted.auc(claim.scores) == {"conv1": 1.0, "conv2": 1.0}


def test_a_network_that_fits_no_site_is_not_pruned_any_more(plant):
    case = plant().case
    claim = Chain(stages=[Told(), Silent(), Told(), Watch()]).attack(case)
    assert isinstance(claim.network, nn.Sequential)
    assert seen[0].sites == () and seen[0].allocation == {}
    planted = plant(known=KEY, key_fraction=1.0)
    claim = Chain(stages=[PartialKey(), Told(), Watch()]).attack(planted.case)
    assert same(claim.network, planted.original)


def test_one_budget_for_all(plant):
    case = plant(labelled=32, steps=7).case
    with case.meter.running():
        Chain(stages=[Finetune(steps=5), Told(), Finetune(steps=5)]).attack(case)
    assert case.meter.steps == 7 and case.meter.samples == 7 * 32
    with pytest.raises(OutOfBudget):
        Chain(stages=[Told(), "recalibrate"]).attack(plant(unlabelled=32, samples=31).case)


def test_stages_that_do_nothing_leave_the_network_as_it_is(plant):
    case = plant().case
    for stages in ([Null()], [Quiet(), Null()], [Null(), Quiet()]):
        assert same(Chain(stages=stages).attack(case).network, case.encrypted)


def test_a_stage_that_claims_nothing_is_named(plant):
    with pytest.raises(ClaimError, match="'watch' claims neither"):
        Chain(stages=[Watch(claims=False)]).attack(plant().case)
    with pytest.raises(ClaimError, match=r"chain: told.*conv1.*\(12,\)"):

        class Wrong(Told):
            def attack(self, case):
                return Claim(scores={"conv1": torch.zeros(15)})

        Chain(stages=[Null(), Told(conv1=(0,), conv2=()), Wrong()]).attack(
            plant(positions={"conv1": (1,), "conv2": ()}).case
        )


def test_chains_in_chains(plant):
    planted = plant(labelled=40)
    inner = Chain(stages=[Told(conv2=()), Finetune(steps=3)])
    claim = Chain(stages=[inner, Watch()]).attack(planted.case)
    assert same(claim.network, inner.attack(plant(labelled=40).case).network)


def test_needs_are_those_of_all_stages():
    attack = Chain(stages=[Collisions(), Recalibrate(images=9), Finetune()])
    assert attack.needs == Needs(unlabelled=9, labelled=2)
    assert Chain().needs == Needs(labelled=2)
    with pytest.raises(ValueError, match="at least 1"):
        Chain(stages=[])


def test_repeatable_and_the_case_stays(plant):
    case = plant(labelled=40).case
    before = {name: tensor.clone() for name, tensor in case.encrypted.state_dict().items()}
    attack = Chain(stages=["norms", Finetune(steps=3)])
    assert same(attack.attack(case).network, attack.attack(case).network)
    assert all(torch.equal(before[name], tensor) for name, tensor in case.encrypted.state_dict().items())
