"""The contract: built-in plugins keep it, and each way of breaking it is caught."""

import dataclasses
import itertools
import random
from typing import ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field

from deepenc.arena.case import Attack, Claim
from deepenc.arena.checks import attacks as contract_attacks
from deepenc.arena.checks.contract import Result, checks_for, run_checks
from deepenc.arena.checks.tiny import Noise, TinySource, TwoEach
from deepenc.arena.threat import Needs
from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
from deepenc.errors import PluginError
from deepenc.plugins import build, names
from deepenc.tasks.examples import Examples

# Their defaults are held to what they promise in test_selftest.py.
SLOW = {
    "finetune": {"epochs": 1},
    "scratch": {"steps": 3},
    "chain": {"stages": ["norms", {"name": "finetune", "epochs": 1}]},
    "tuned": {"of": {"name": "finetune", "epochs": 1}, "trials": 2},
    "replace-block": {"steps": 3, "warm": 2},
    "shadow": {"encryptions": 2, "trees": 40, "folds": 2},
    "optimise": {"steps": 10},
}
KINDS = ("attack", "placement", "weights", "hardening")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in names(kind)], ids=lambda v: str(v)
)
def test_built_in_plugins_keep_the_contract(kind, name):
    plugin = build(kind, {"name": name} | SLOW.get(name, {}))
    assert [r for r in run_checks(plugin) if not r.passed] == []


@pytest.mark.parametrize("name", names("defense"))
def test_nothing_pries_a_built_in_defense_open(name):
    assert [r for r in run_checks(quick(Defense.model_validate(name))) if not r.passed] == []


def quick(defense):
    """With fewer steps, which change the weights' values alone: prying does not look at them."""
    steps = (
        step.model_copy(update={"steps": 10}) if hasattr(step, "steps") else step
        for step in defense.hardening
    )
    return defense.model_copy(update={"hardening": tuple(steps)})


def scores(case, value=0.0):
    return Claim(scores={site.name: torch.full((site.width,), float(value)) for site in case.sites})


class Good(Attack):
    """Suspect nobody."""

    name: ClassVar[str] = "good"

    def attack(self, case):
        return scores(case)


class Silent(Attack):
    name: ClassVar[str] = "silent"

    def attack(self, case):
        return scores(case)


class Nameless(Attack):
    """No name."""

    name: ClassVar[str] = ""

    def attack(self, case):
        return scores(case)


class Thawed(Good):
    """Not frozen."""

    model_config = ConfigDict(frozen=False)


class Odd(Good):
    """Describes itself wrongly."""

    thing: int = 0

    def spec(self):
        return super().spec() | {"thing": 1}


class NotFinite(Good):
    """Infinite scores."""

    def attack(self, case):
        return scores(case, float("inf"))


class WrongShape(Good):
    """Scores of one channel too many."""

    def attack(self, case):
        return Claim(scores={site.name: torch.zeros(site.width + 1) for site in case.sites})


class NaNs(Good):
    """A network of NaNs."""

    def attack(self, case):
        network = case.copy()
        for parameter in network.parameters():
            parameter.data.fill_(float("nan"))
        return Claim(network=network)


class Vandal(Good):
    """Changes the case's network."""

    def attack(self, case):
        case.encrypted.fc.weight.data.add_(1)
        return scores(case)


class Trainer(Good):
    """Leaves the case's network in training mode."""

    def attack(self, case):
        case.encrypted.train()
        return scores(case)


class Painter(Good):
    """Changes the images."""

    def attack(self, case):
        case.labelled.inputs.mul_(2)
        return scores(case)


class Gambler(Good):
    """Draws from the global generators."""

    def attack(self, case):
        return scores(case, float(torch.rand(())) + random.random())


class GradOff(Good):
    """Leaves gradients off."""

    def attack(self, case):
        torch.set_grad_enabled(False)
        return scores(case)


_COUNTER = itertools.count()


class Moody(Good):
    """Another claim at every call."""

    def attack(self, case):
        return scores(case, next(_COUNTER))


class Undeclared(Good):
    """Needs labels and does not say so."""

    def attack(self, case):
        return scores(case, float(case.labelled.targets[0]))


class Clumsy(Good):
    """Crashes when its budget is spent."""

    def attack(self, case):
        try:
            case.encrypted(case.example)
        except Exception:
            raise RuntimeError("no more budget") from None
        return scores(case)


class Wasteful(Good):
    """Sets the meter back."""

    def attack(self, case):
        case.meter.samples = 0
        return scores(case)


class Exiting(Good):
    """Ends the program."""

    def attack(self, case):
        raise SystemExit(0)


class Alternating(Good):
    """Another claim at every second call."""

    def attack(self, case):
        return scores(case, next(_COUNTER) % 2)


class Undocumented(Good):
    """A parameter that nobody explains."""

    secret_ingredient: int = 0


class Bounded(Good):
    """Cannot do with none, though its bounds say so."""

    size: int = Field(3, ge=0)
    """Size."""

    def attack(self, case):
        return scores(case, 6 // self.size)


class Wishful(Good):
    """Promises to see what nobody plants."""

    detects: ClassVar[str] = "nosuch"


class Telepath(Good):
    """Reads what a leaking arena wrote into the case."""

    def attack(self, case):
        return scores(case, sum(sum(positions) for positions in case.encrypted.hint.values()))


class Needy(Good):
    """Says what it needs, and is given it."""

    @property
    def needs(self):
        return Needs(labelled=300, key_fraction=0.5)

    def attack(self, case):
        assert len(case.labelled) >= 300
        assert case.known
        return scores(case)


def failed(plugin):
    return {result.name: result.detail for result in run_checks(plugin) if not result.passed}


@pytest.mark.parametrize("attack", [Good(), Needy(), Good], ids=["plain", "needy", "class"])
def test_a_good_attack_passes(attack):
    assert failed(attack) == {}


@pytest.mark.parametrize(
    ("attack", "check", "told"),
    [
        (Silent(), "docstring", "no docstring"),
        (Nameless(), "has a name", "name"),
        (Thawed(), "frozen", "frozen"),
        (Odd(), "description", "expected"),
        (NotFinite(), "can be judged", "finite"),
        (WrongShape(), "can be judged", "shape"),
        (NaNs(), "can be judged", "NaN for 64"),
        (Vandal(), "leaves its case", "fc.weight"),
        (Trainer(), "leaves its case", "training mode"),
        (Painter(), "leaves its case", "labelled"),
        (Gambler(), "leaves its case", "torch, random"),
        (GradOff(), "leaves its case", "grad mode"),
        (Moody(), "same seed", "differ"),
        (Undeclared(), "says it needs", "needs"),
        (Clumsy(), "budget of nothing", "RuntimeError"),
        (Wasteful(), "can be judged", "AttributeError"),
        (Exiting(), "can be judged", "SystemExit"),
        (Alternating(), "same seed", "differ"),
        (Undocumented(), "each parameter", "secret_ingredient"),
        (Bounded(), "bounds", "with size=0 it raises ZeroDivisionError"),
        (Wishful(), "planted weakness", "'nosuch'; expected None, or one of loud,"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Attack) else None,
)
def test_broken_attacks_are_caught(attack, check, told):
    found = failed(attack)
    assert any(check in name and told in detail for name, detail in found.items()), found


def test_one_fault_is_told_once_and_what_was_not_promised_is_not_counted():
    results = run_checks(Exiting())
    told = [result for result in results if not result.passed and not result.repeated]
    assert [result.name for result in told] == ["makes a claim that can be judged"]
    assert "SystemExit: 0" in told[0].detail
    assert any(result.detail == "as above: makes a claim that can be judged" for result in results)
    (promise,) = [r for r in run_checks(Good()) if "planted weakness" in r.name]
    assert promise.passed and not promise.checked
    blind = [r for r in run_checks(Alternating()) if r.name == "claims the same whatever the key"]
    assert [(r.passed, r.checked) for r in blind] == [(True, False)]


def test_a_claim_that_changes_with_the_key_is_caught(monkeypatch):
    build_case = contract_attacks.build_case

    def leaking(encryption, *rest):
        case = build_case(encryption, *rest)
        case.encrypted.hint = encryption.key.positions
        return case

    monkeypatch.setattr(contract_attacks, "build_case", leaking)
    assert "see it" in failed(Telepath())["claims the same whatever the key"]
    assert "claims the same whatever the key" not in failed(Good())


class Negative(Placement):
    """Fewer than none."""

    name: ClassVar[str] = "negative"

    def place(self, original, rng):
        return {site.name: -1 for site in original.sites}


class Boundless(TwoEach):
    """Far more than there are."""

    def place(self, original, rng):
        return {site.name: 10**7 for site in original.sites}


class Stranger(TwoEach):
    """Names a site of another network."""

    def place(self, original, rng):
        return {"elsewhere": 3}


class Restless(TwoEach):
    """Ignores its generator."""

    def place(self, original, rng):
        return {site.name: 1 + next(_COUNTER) % 5 for site in original.sites}


class Meddler(TwoEach):
    """Changes the victim."""

    def place(self, original, rng):
        original.model.fc.bias.data.add_(1)
        return super().place(original, rng)


class Cropped(Noise):
    """Values of a wrong shape."""

    def fill(self, neurons, rng, channels):
        return [value[:1] for value in super().fill(neurons, rng, channels)]


class Infinite(Noise):
    """Infinite values."""

    def fill(self, neurons, rng, channels):
        return [value / 0 for value in super().fill(neurons, rng, channels)]


class Global(Noise):
    """Draws from torch's global generator."""

    def fill(self, neurons, rng, channels):
        return [torch.randn_like(value) for value in super().fill(neurons, rng, channels)]


class Forgetful(Hardening):
    """Changes a real weight."""

    name: ClassVar[str] = "forgetful"

    def harden(self, network, layout, original, rng):
        with torch.no_grad():
            network.fc.bias.add_(1)


@pytest.mark.parametrize(
    ("plugin", "told"),
    [
        (Negative(), ">= 0"),
        (Boundless(), "10000000 confusion channels beside 24 real ones; expected at most 16 times"),
        (Stranger(), "elsewhere"),
        (Restless(), "differ"),
        (Meddler(), "fc.bias"),
        (Cropped(), "shape"),
        (Infinite(), "finite"),
        (Global(), "global generators of torch"),
        (Forgetful(), "changed real entries"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_broken_parts_of_defenses_are_caught(plugin, told):
    found = failed(plugin)
    assert any(told in detail for detail in found.values()), found
    assert failed(TwoEach()) == {}  # and a broken one does not spoil the checks of others


def test_good_parts_of_defenses_pass():
    class Idle(Hardening):
        """Does nothing."""

        name: ClassVar[str] = "idle"

        def harden(self, network, layout, original, rng):
            network.left_behind = layout.positions

    assert failed(Noise()) == {}
    assert failed(Idle()) == {}


@pytest.mark.parametrize("text", ["absolute:count=2,sites=[conv1]", "absolute:count=1,sites=[conv2]"])
def test_few_keys_are_no_leak(text):
    """Guesses at random come near the key of 325, or of 33, now and then."""
    assert failed(build("placement", text)) == {}


class Toys(TinySource):
    """The network of the checks."""

    name: ClassVar[str] = "toys"
    fault: str = "none"
    """What is wrong."""

    def load(self, cache):
        victim = super().load(cache)
        match self.fault:
            case "shared":
                return dataclasses.replace(victim, judge=victim.attacker)
            case "classes":
                return dataclasses.replace(
                    victim, judge=Examples(victim.judge.inputs, victim.judge.targets + 9)
                )
            case "chance":
                labels = (victim.judge.targets + 1) % victim.task.classes
                return dataclasses.replace(victim, judge=Examples(victim.judge.inputs, labels))
            case "restless":
                return dataclasses.replace(victim, fingerprint=str(next(_COUNTER)))
            case "nothing":
                return None
        return victim


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("shared", "attacker's examples are the judge's"),
        ("classes", "VictimError"),
        ("chance", "better than chance"),
        ("restless", "fingerprint"),
        ("nothing", "expected a Victim"),
    ],
)
def test_broken_victims_are_caught(fault, told):
    found = failed(Toys(fault=fault))
    assert any(told in detail for detail in found.values()), found
    assert failed(Toys()) == {}


def test_there_are_no_checks_for_other_things():
    class Unfinished(Weights):
        """Abstract."""

        name: ClassVar[str] = "unfinished"

    with pytest.raises(PluginError, match="expected an attack"):
        checks_for(3)
    with pytest.raises(PluginError, match="fill"):
        checks_for(Unfinished)


def test_results_are_told_in_words():
    assert all(isinstance(r, Result) and r.name for r in run_checks(Good()))
