"""The attacker's own search: planted optima, charges, failures."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import optuna
import pytest
import torch
from pydantic import Field

from attacks.chain import Chain
from attacks.finetune import Finetune
from attacks.tuned import Tuned
from deepenc.arena.case import Attack, Claim
from deepenc.arena.kit.space import Axis, varied
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError, OutOfBudget
from deepenc.network.sites import Role

seen: list[Any] = []


class Peaked(Attack):
    """Claims a network that is right the more often, the nearer x is to 0.7 on a logarithmic scale."""

    name: ClassVar[str] = "peaked"
    x: float = Field(0.001, gt=0, le=10)
    color: str | None = "red"
    fails: bool = False
    spends: int = 0

    @property
    def needs(self):
        return Needs(labelled=3)

    def attack(self, case):
        seen.append((self, case))
        if self.fails or self.x > 5:
            raise ZeroDivisionError("planted")
        if self.spends:
            case.meter.charge(samples=self.spends)
        network = case.copy()
        distance = abs(torch.tensor(self.x / 0.7).log10()) + (self.color != "blue")
        with torch.no_grad():
            network.linear.bias.mul_(0).add_(torch.tensor([30.0, 0, 0, 0]) * distance)
        return Claim(network=network)


class Sees(Attack):
    """Suspects one of two channels."""

    name: ClassVar[str] = "sees"
    right: bool = False

    def attack(self, case):
        score = torch.zeros(13)
        score[4 if self.right else 5] = 1
        return Claim(scores={"conv1": score})


WIDE = {"x": {"low": 0.001, "high": 4.0, "log": True}}


@pytest.fixture(autouse=True)
def nothing_seen():
    seen.clear()


def harmful(slot, shape, victim, generator):
    """Channels that are always on, and say something wrong to all that follow."""
    if slot.role is Role.OUTGOING:
        return 10 * victim.std() * torch.randn(shape, generator=generator)
    return torch.full(shape, {Role.SHIFT: 30.0, Role.VARIANCE: 1.0}.get(slot.role, 0.0))


def test_the_search_finds_a_planted_optimum(plant):
    planted = plant(positions={}, labelled=100, trials=20)
    attack = Tuned(of=Peaked(), space=WIDE | {"color": ["red", "blue", None]}, trials=20)
    network = attack.attack(planted.case).network
    best, case = seen[-1]
    assert best.color == "blue" and 0.1 < best.x < 4
    assert planted.accuracy(network) > 0.95 > planted.accuracy(Peaked().attack(planted.case).network)
    assert case.labelled is planted.case.labelled  # at the end, all images


def test_the_first_trial_is_the_attack_as_given_and_the_best_wins(plant):
    case = plant(positions={}, labelled=40, trials=6).case
    attack = Tuned(of=Peaked(x=0.7, color="blue"), space=WIDE | {"color": ["red", "blue"]}, trials=6)
    attack.attack(case)
    assert len(seen) == 7 and (seen[0][0].x, seen[0][0].color) == (0.7, "blue")
    assert (seen[-1][0].x, seen[-1][0].color) == (0.7, "blue")


def test_everything_is_charged(plant):
    case = plant(labelled=40, trials=5).case
    with case.meter.running():
        Tuned(of=Finetune(steps=3), space={"lr": [0.01, 0.1]}, trials=4, validation=0.25).attack(case)
    meter = case.meter
    # Four trials of three steps on 30 images, judged on 10; then three steps on 40.
    assert (meter.trials, meter.steps, meter.samples) == (4, 5 * 3, 4 * (3 * 30 + 10) + 3 * 40)
    with pytest.raises(OutOfBudget, match="5 trials"):
        Tuned(of=Finetune(steps=3), space={"lr": [0.01]}, trials=2).attack(case)


def test_trials_share_the_steps(plant):
    case = plant(labelled=40, trials=3, steps=14).case
    with case.meter.running():
        Tuned(of=Finetune(steps=50), space={"lr": [0.01, 0.1]}, trials=3).attack(case)
    # 14 // 4, 11 // 3, 8 // 2, and what is left.
    assert case.meter.steps == 14 and case.meter.samples == (3 + 3 + 4) * 32 + 3 * 8 + 4 * 40
    assert case.meter.limit("steps") == case.threat.steps


def test_trials_share_the_samples_and_leave_enough_to_judge(plant):
    case = plant(labelled=40, trials=3, samples=520).case
    with case.meter.running():
        Tuned(of=Finetune(steps=50), space={"lr": [0.01, 0.1]}, trials=3).attack(case)
    # Of 520 - 24 a quarter is 3 steps of 32, of what is left then a third 4, and half 4; 3 of 40 remain.
    assert case.meter.steps == 3 + 4 + 4 + 3 and case.meter.samples == 11 * 32 + 24 + 3 * 40


def test_training_and_validation_images_are_apart(plant):
    case = plant(positions={}, labelled=40, trials=1).case
    attack = Tuned(of=Peaked(), space=WIDE, trials=1, validation=0.3)
    training, validation = attack.split(case)
    assert (len(training), len(validation)) == (28, 12)
    rows = {tuple(image.flatten().tolist()) for image in torch.cat([training.inputs, validation.inputs])}
    assert len(rows) == 40
    for part in (training, validation):
        for image, label in zip(part.inputs, part.targets, strict=True):
            (index,) = (case.labelled.inputs == image).flatten(1).all(1).nonzero()
            assert case.labelled.targets[index] == label


def test_failed_trials_do_not_stop_the_search(plant):
    case = plant(positions={}, labelled=40, trials=8).case
    attack = Tuned(of=Peaked(x=0.7), space={"x": [0.7, 6.0, 7.0], "fails": [False, True]}, trials=8)
    attack.attack(case)
    assert any(tried.x > 5 or tried.fails for tried, _ in seen)
    assert seen[-1][0].x == 0.7 and not seen[-1][0].fails and case.meter.trials == 8


def test_if_all_trials_fail_so_does_the_attack(plant):
    attack = Tuned(of=Peaked(fails=True), space=WIDE, trials=3)
    case = plant(labelled=40, trials=3).case
    with pytest.raises(ZeroDivisionError, match="planted"):
        attack.attack(case)
    assert len(seen) == 3 and case.meter.trials == 3
    with pytest.raises(OutOfBudget):
        Tuned(of=Finetune(), trials=2).attack(plant(labelled=40, trials=2, samples=0).case)


def test_a_detector_is_judged_by_what_is_left_after_removal(plant):
    planted = plant(harmful, positions={"conv1": (4,), "conv2": ()}, labelled=60, trials=4)
    assert planted.accuracy(planted.case.encrypted) < 0.8
    claim = Tuned(of=Sees(), space={"right": [False, True]}, trials=4).attack(planted.case)
    assert claim.scores["conv1"].argmax() == 4 and claim.network is None
    blind = plant(harmful, positions={"conv1": (4,), "conv2": ()}, labelled=60, trials=4, allocation=False)
    with pytest.raises(ClaimError, match="tune a chain"):
        Tuned(of=Sees(), space={"right": [False, True]}, trials=4).attack(blind.case)


def test_a_trial_that_diverged_is_no_mark_on_the_attack(plant):
    case = plant(harmful, labelled=40, trials=8).case
    attack = Tuned(of=Finetune(steps=20, lr=1e30), space={"lr": [1e30, 0.01]}, trials=4)
    assert attack.best(case) == {"lr": 0.01} and not attack.attack(case).diverged
    case = plant(labelled=40, trials=1).case
    assert Tuned(of=Finetune(steps=5, lr=1e30), space={"lr": [1e30]}, trials=1).attack(case).diverged


def test_repeatable_and_quiet(plant, capfd):
    attack, found = Tuned(of=Finetune(steps=2), trials=4), []
    level = optuna.logging.get_verbosity()
    for seed in (5, 5, 6):
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        network = attack.attack(plant(labelled=40, trials=4, seed=seed).case).network
        assert torch.equal(before, torch.get_rng_state())
        found.append(network.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["linear.weight"], found[2]["linear.weight"])
    assert optuna.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


def test_needs_leave_enough_to_train_and_to_judge(plant):
    attack = Tuned(of=Peaked(), space=WIDE, trials=7, validation=0.5)
    assert attack.needs.trials == 7
    for validation in (0.01, 0.2, 0.5, 0.9):
        attack = Tuned(of=Peaked(), space=WIDE, trials=1, validation=validation)
        training, held = attack.split(plant(labelled=attack.needs.labelled).case)
        assert len(training) >= 3 and len(held) >= 1


def test_nested_parameters():
    chain = Chain(stages=["norms", Finetune(steps=3)])
    other = varied(chain, {"stages.1.lr": 0.5, "excess": 2})
    assert other.stages == (chain.stages[0], Finetune(steps=3, lr=0.5)) and other.excess == 2
    assert Tuned(of=chain, space={"stages.1.lr": [0.1], "stages.1.steps": {"low": 1, "high": 9}}).trials


def test_kinds_of_axes():
    assert Axis(field="a", low=1, high=3).suggest(optuna.trial.FixedTrial({"a": 2})) == 2
    assert isinstance(Axis(field="a", low=1.0, high=3).suggest(optuna.trial.FixedTrial({"a": 2})), float)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    logs = [Axis(field="a", low=1e-4, high=1.0, log=True).suggest(study.ask()) for _ in range(40)]
    assert 10 < sum(value < 0.01 for value in logs) < 30
    whole = [Axis(field="b", low=1, high=3).suggest(study.ask()) for _ in range(40)]
    assert set(whole) == {1, 2, 3} and all(isinstance(value, int) for value in whole)


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ({"speed": [1]}, "'speed' names no parameter"),
        ({"x": {"low": -1, "high": 1}}, "'x' does not take -1"),
        ({"x": {"low": 1, "high": 11}}, "'x' does not take 11"),
        ({"x": ["much"]}, "'x' does not take 'much'"),
        ({"x": {"low": 1}}, "list of choices, or a range"),
        ({"x": []}, "list of choices, or a range"),
        ({"x": {"low": 2, "high": 1}}, "low <= high"),
        ({"x": {"low": 0, "high": 1, "log": True}}, "above 0"),
        ({"x": {"low": 1, "high": 2, "steps": 3}}, "steps"),
        ({"x.y": [1]}, "'x.y' names no parameter"),
        ([{"field": "x", "choices": [1]}, {"field": "x", "choices": [2]}], "twice"),
        ({}, "at least 1"),
    ],
)
def test_spaces_that_cannot_be_meant(space, match):
    with pytest.raises(ValueError, match=match):
        Tuned(of=Peaked(), space=space)


def test_it_comes_back_from_its_own_description():
    attack = Tuned(of="finetune", space={"lr": {"low": "1e-4", "high": 0.1, "log": True}, "steps": [5, None]})
    again = Tuned(**{key: value for key, value in attack.spec().items() if key != "name"})
    assert again == attack and hash(again) == hash(attack)


def test_importing_it_does_not_import_optuna():
    check = "import sys, attacks.tuned, deepenc; assert 'optuna' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_seed_decides_what_is_tried(plant):
    tried = []
    for seed in (5, 5, 6):
        seen.clear()
        Tuned(of=Peaked(), space=WIDE, trials=4).attack(plant(labelled=40, trials=4, seed=seed).case)
        tried.append([attack.x for attack, _ in seen[:4]])
    assert tried[0] == tried[1] != tried[2]
