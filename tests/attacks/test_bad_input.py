"""Every attack under poor conditions: one class only, no budget, images that tell nothing, odd networks."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.tiny import Unusual, host_defense, tiny_subject, unusual_subject
from deepenc.arena.duel import Measured, measure, run_attack
from deepenc.arena.threat import Threat
from deepenc.errors import OutOfBudget
from deepenc.plugins import build, names
from deepenc.seeds import isolated
from deepenc.tasks.examples import Examples

QUICK = {
    "finetune": {"epochs": 1},
    "scratch": {"steps": 2},
    "renormalise": {"steps": 2},
    "chain": {"stages": ["norms", {"name": "finetune", "epochs": 1}]},
    "tuned": {"of": {"name": "finetune", "epochs": 1}, "trials": 2},
    "replace-block": {"steps": 2, "warm": 1},
    "gates": {"steps": 3},
    "oracle-gates": {"steps": 3},
    "distill": {"steps": 2},
    "ablation": {"images": 4},
    "shadow": {"encryptions": 1, "trees": 5},
    "container": {"seeds": 2},
}
ATTACKS = [build("attack", {"name": name} | QUICK.get(name, {})) for name in names("attack")]
VARIANTS = [
    build("attack", spec)
    for spec in (
        {"name": "ablation", "objective": "loss", "images": 4},
        {"name": "alignment", "look_for": "both"},
        *({"name": "activations", "statistic": s, "images": 8} for s in ("dead", "sparsity", "selectivity")),
        *({"name": "distribution", "statistic": s} for s in ("ks", "ad", "energy", "moments")),
        *({"name": "outliers", "method": m} for m in ("covariance", "isolation-forest", "lof", "svm")),
    )
]
"""Parameters other than the defaults that look at channels in another way."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encryption():
    return Encryption.of(tiny_subject(600), host_defense(), bytes(range(32)))


def case_for(attack, encryption, **more):
    needs = attack.needs.given_by_threats()
    images = {what: max(32, needs[what]) for what in ("labelled", "unlabelled")}
    threat = Threat(name="poor", **needs | images | {"trials": 50, "oracle": 400} | more)
    return build_case(encryption, threat, 1, 2, CPU)


def judged(attack, case, encryption):
    """What the arena makes of it: no NaN in scores, a network that can be judged."""
    with isolated(7):
        return measure(run_attack(attack, case, attack.name), case, encryption, attack.name, 32)


def readable(measured):
    """Whether something was measured, and no network of NaNs."""
    return measured != Measured() and (measured.score is None or measured.score.unreadable == 0)


@pytest.fixture(scope="module", params=get_args(Unusual))
def unusual(request):
    return Encryption.of(unusual_subject(request.param, 600), host_defense(), bytes(range(32)))


@pytest.mark.parametrize("attack", ATTACKS + VARIANTS, ids=str)
def test_an_unusual_network_is_judged_all_the_same(attack, unusual):
    assert judged(attack, case_for(attack, unusual), unusual) != Measured()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_one_class_alone(attack, encryption):
    case = case_for(attack, encryption)
    labels = torch.zeros_like(case.labelled.targets)
    case = dataclasses.replace(case, labelled=Examples(case.labelled.inputs, labels))
    assert readable(judged(attack, case, encryption))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_images_that_are_all_zero(attack, encryption):
    case = case_for(attack, encryption)
    labelled = Examples(torch.zeros_like(case.labelled.inputs), case.labelled.targets)
    case = dataclasses.replace(
        case, labelled=labelled, unlabelled=Examples(torch.zeros_like(case.unlabelled.inputs))
    )
    assert readable(judged(attack, case, encryption))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_no_steps_still_end_in_a_claim(attack, encryption):
    case = case_for(attack, encryption, steps=0)
    assert judged(attack, case, encryption) != Measured() and case.meter.steps == 0


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_no_samples_end_in_an_answer_or_out_of_budget(attack, encryption):
    case = case_for(attack, encryption, samples=0)
    try:
        judged(attack, case, encryption)
    except OutOfBudget as error:
        assert "allows 0 samples" in str(error)
    assert case.meter.samples == 0
