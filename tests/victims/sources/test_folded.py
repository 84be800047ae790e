"""A folded victim is its base without running statistics: same function, same images in the same parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.batchnorm_defaults import BatchNormDefaults
from attacks.batchnorm_mismatch import BatchnormMismatch
from attacks.peel import Peel
from attacks.recalibrate import Recalibrate
from deepenc.arena.build import Encryption, Subject, build_case
from deepenc.arena.checks.planted import planted_defense
from deepenc.arena.checks.tiny import TinySource
from deepenc.arena.duel import judged, measure, run_attack
from deepenc.arena.threat import Threat
from deepenc.config import load
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError
from deepenc.plugins import build
from deepenc.victims.sources.cifar import Cifar10ResNet20
from deepenc.victims.sources.downstream import Downstream
from deepenc.victims.sources.folded import Folded
from deepenc.victims.sources.network import Network
from deepenc.victims.victim import Victim, source_of

CPU = torch.device("cpu")


def norms(model) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def test_function_and_parts_are_the_bases(folder):
    base = Cifar10ResNet20(folder=folder).load(folder)
    victim = Folded(base=Cifar10ResNet20(folder=folder)).load(folder)
    assert (norms(base.model), norms(victim.model)) == (19, 0)
    for part in ("defender", "attacker", "judge"):
        own, other = getattr(victim, part), getattr(base, part)
        assert torch.equal(own.inputs, other.inputs) and torch.equal(own.targets, other.targets)
    with torch.no_grad():
        expected = base.model.double()(base.judge.inputs.double())
        found = victim.model.double()(base.judge.inputs.double())
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max())  # float32 was rounded
    assert (victim.name, victim.task.classes, victim.public) == ("cifar10-resnet20 folded", 10, None)


def test_the_network_needs_no_images_and_is_the_victims(folder):
    source = Folded(base=Cifar10ResNet20(folder=folder))
    victim = source.load(folder)
    for file in (folder / "cifar10").iterdir():
        file.unlink()
    network, example = source.network(folder)
    assert torch.equal(network(example), victim.model(example)) and source.structure() is None


def test_the_fingerprint_is_its_own_and_sees_weights_and_data(folder):
    base = Cifar10ResNet20(folder=folder)
    prints = {base.load(folder).fingerprint, Folded(base=base).load(folder).fingerprint}
    assert Folded(base=base).load(folder).fingerprint in prints and len(prints) == 2
    file = folder / "cifar10" / "test.npz"
    with np.load(file) as held:
        arrays = dict(held)
    arrays["images"][0, 0, 0, 0] ^= 1
    np.savez(file, **arrays)
    prints.add(Folded(base=base).load(folder).fingerprint)
    stored = torch.load(folder / "cifar10_resnets" / "resnet20-abc.th")
    stored["state_dict"]["module.bn1.running_var"] += 1
    torch.save(stored, folder / "cifar10_resnets" / "resnet20-abc.th")
    prints.add(Folded(base=base).load(folder).fingerprint)
    assert len(prints) == 4


def test_the_public_network_is_folded_too(folder, monkeypatch):
    monkeypatch.setattr("deepenc.victims.sources.downstream.fit", lambda *_: True)
    base = Downstream(base=Cifar10ResNet20(folder=folder), folder=folder, trained=True)
    victim, original = Folded(base=base).load(folder), base.load(folder)
    assert norms(original.public) == 19 and norms(victim.public) == norms(victim.model) == 0
    inputs = victim.judge.inputs
    with torch.no_grad():
        assert torch.allclose(victim.public(inputs), original.public(inputs), rtol=1e-3, atol=1e-4)
    own, public = victim.model.state_dict(), victim.public.state_dict()
    assert own.keys() == public.keys()


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((nn.Linear(4, 4), nn.ReLU()), "it has none"),
        ((nn.BatchNorm1d(4), nn.Linear(4, 2)), "no convolution or linear layer comes directly before it"),
    ],
)
def test_a_base_with_nothing_to_fold_is_refused(layers, why, folder):
    class Base(TinySource):
        def network(self, cache):
            return nn.Sequential(*layers), torch.zeros(2, 4)

    with pytest.raises(ConfigError, match=rf"tiny has no such one: {why}\. Take that victim as it is"):
        Folded(base=Base()).network(folder)


def test_text_and_configurations_name_it(folder, tmp_path):
    spec = {"name": "folded", "base": "cifar10-resnet20"}
    expected = Folded(base=Cifar10ResNet20())
    assert source_of("folded:base=cifar10-resnet20") == build("victim", spec) == expected == Folded()
    assert build("victim", json.loads(json.dumps(expected.spec()))) == expected
    assert source_of("folded:base=torchvision:mobilenet_v2").base == Network(
        factory="torchvision:mobilenet_v2"
    )
    (tmp_path / "a.yaml").write_text(
        "name: a\nvictims: [{name: folded, base: cifar10-resnet20}]\ndefenses: [null, paper-samp]\n"
        "attacks: [{name: recalibrate, victims: [cifar10-resnet20 folded]}]\n"
        "threats: [{name: thief, unlabelled: 32}]\n"
    )
    assert load(tmp_path / "a.yaml").victims == (expected,)


# What becomes of attacks that read running statistics.


@pytest.fixture(scope="module")
def tiny() -> Victim:
    return Folded(base=TinySource()).load(Path())


def case_of(victim, defense, **threat):
    encryption = Encryption.of(Subject.of(victim), Defense.of(defense), bytes(range(32)))
    return build_case(encryption, Threat(name="test", **threat), 3, 4, CPU), encryption


def test_who_trains_from_scratch_has_batchnorm_and_none_of_the_victims_numbers(tiny):
    case, _ = case_of(tiny, "paper-samp")
    blank = case.blank(0)
    assert norms(blank) == 3 and norms(case.encrypted) == 0
    assert all(m.running_mean.eq(0).all() for m in blank.modules() if isinstance(m, _BatchNorm))
    own = {tuple(t.flatten().tolist()) for t in tiny.model.state_dict().values()}
    assert not own & {tuple(t.flatten().tolist()) for t in blank.state_dict().values()}
    base = TinySource().load(Path())
    other = case_of(base, "paper-samp")[0].blank(0).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in blank.state_dict().items())


@pytest.mark.parametrize("weakness", ["statistics", "damage"])
def test_attacks_on_statistics_find_none(tiny, weakness):
    for attack in (Recalibrate(), Peel(), BatchnormMismatch(images=64)):
        case, encryption = case_of(tiny, planted_defense(weakness), unlabelled=64)
        found = measure(run_attack(attack, case, attack.name), case, encryption, attack.name, None)
        if found.detection is not None:
            assert found.detection.auc == 0.5
        else:
            assert case.meter.samples == 0
            assert found.score == judged(case.encrypted, tiny, "encrypted", None, CPU)


def test_biases_alone_tell_nothing_where_they_are_like_the_victims(tiny):
    case, encryption = case_of(tiny, "paper-samp")
    found = measure(run_attack(BatchNormDefaults(), case, "x"), case, encryption, "x", None)
    # 5 confusion channels among 96 real ones, ranked at random: a deviation of 0.14.
    assert 0.2 < found.detection.auc < 0.8


def test_biases_are_still_read_where_nobody_trained_them(tiny):
    case, encryption = case_of(tiny, planted_defense("defaults"))
    attack = BatchNormDefaults()
    found = measure(run_attack(attack, case, attack.name), case, encryption, attack.name, None)
    assert found.detection.auc == 1
