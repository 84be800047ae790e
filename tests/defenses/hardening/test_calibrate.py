from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.arena.checks.defenses import hardening_checks
from deepenc.arena.checks.tiny import Noise, TwoEach, tiny_subject
from deepenc.encryption.defense import Defense, Original
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys.key import Key
from deepenc.errors import ConfigError
from defenses.hardening.calibrate import Calibrate

NORMS = ("bn1", "bn2", "bn3")


@pytest.fixture
def encrypted() -> tuple[nn.Module, Key, Original]:
    subject = tiny_subject()
    original = Original(
        subject.victim.model, subject.sites, subject.victim.example, subject.victim.defender.inputs
    )
    host = Defense(name="t", placement=TwoEach(), weights=Noise())
    network, key = encrypt(original.model, original.example, host, seed=5, sites=subject.sites)
    return network, key, original


def seen(network: nn.Module, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of what each BatchNorm gets, by hooks of our own."""
    found = {}

    def see(name: str, values: Tensor) -> None:
        found[name] = (values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0))

    network = copy.deepcopy(network)
    for name in NORMS:
        getattr(network, name).register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
    with torch.no_grad():
        network(inputs)
    return found


def of(key: Key, norm: str) -> list[int]:
    return list(key.positions[norm.replace("bn", "conv")])


def harden(network: nn.Module, key: Key, original: Original, **fields: object) -> None:
    Calibrate(**fields).harden(network, key.layout(), original, np.random.default_rng(1))


def test_encrypted_path_agrees_with_the_released_network(encrypted: tuple[nn.Module, Key, Original]) -> None:
    network, key, original = encrypted
    before = {name: getattr(network, name).running_mean.clone() for name in NORMS}
    harden(network, key, original, path="encrypted")
    after = seen(network, original.data.inputs)
    for name in NORMS:
        norm, inserted = getattr(network, name), of(key, name)
        assert not torch.allclose(before[name][inserted], norm.running_mean[inserted], rtol=0.1)
        assert torch.allclose(after[name][0][inserted], norm.running_mean[inserted], rtol=1e-4, atol=1e-5)
        assert torch.allclose(after[name][1][inserted], norm.running_var[inserted], rtol=1e-4)


def test_clean_path_is_what_the_victims_own_channels_give(
    encrypted: tuple[nn.Module, Key, Original],
) -> None:
    network, key, original = encrypted
    weight = network.conv2.weight.detach().clone()
    harden(network, key, original)
    victim = original.model
    with torch.no_grad():
        hidden = torch.relu(victim.bn1(victim.conv1(original.data.inputs)))
    own = [c for c in range(weight.shape[1]) if c not in of(key, "bn1")]
    inserted = of(key, "bn2")
    made = nn.functional.conv2d(hidden, weight[inserted][:, own], stride=2, padding=1)
    assert torch.allclose(network.bn2.running_mean[inserted], made.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert torch.allclose(
        network.bn2.running_var[inserted], made.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("path", ["clean", "encrypted"])
def test_nothing_but_confusion_statistics_changes(
    encrypted: tuple[nn.Module, Key, Original], path: str
) -> None:
    network, key, original = encrypted
    network.bn2.momentum = 0.07
    network.bn3.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kept = {id(tensor) for tensor in network.state_dict(keep_vars=True).values()}
    harden(network, key, original, path=path)
    for name, tensor in network.state_dict().items():
        changed = (tensor != before[name]).nonzero().flatten().tolist()
        assert changed == (of(key, name[:3]) if "running" in name else []), name
    assert {id(tensor) for tensor in network.state_dict(keep_vars=True).values()} == kept
    assert network.bn2.momentum == 0.07
    assert [module.training for module in network.children()].count(True) == 1 and network.bn3.training
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_victim_comes_back_and_equal_generators_do_equal_things() -> None:
    subject = tiny_subject()
    victim = subject.victim
    defense = Defense(name="t", placement=TwoEach(), weights=Noise(), hardening=(Calibrate(images=40),))
    made = [
        encrypt(
            victim.model, victim.example, defense, seed=s, sites=subject.sites, data=victim.defender.inputs
        )
        for s in (1, 1)
    ]
    (one, key), (two, _) = made
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    back = decrypt(one, key).state_dict()
    assert all(torch.equal(t, back[n]) for n, t in victim.model.state_dict().items())


def test_without_batchnorm_it_says_that_it_changes_nothing(planted: object) -> None:
    net, _, sites = planted  # type: ignore[misc]
    defense = {"name": "t", "placement": {"name": "proportional", "sites": "3"}, "weights": "samp"}
    data = torch.zeros(8, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"changes nothing.*leave it out"):
        encrypt(net, data, {**defense, "hardening": (Calibrate(),)}, seed=0, sites=sites, data=data)


@pytest.mark.parametrize("count", [None, 0, 1])
def test_without_images_it_says_what_to_give(
    encrypted: tuple[nn.Module, Key, Original], count: int | None
) -> None:
    network, key, original = encrypted
    data = None if count is None else original.data[:count]
    with pytest.raises(ConfigError, match=r"defender's examples.*data="):
        harden(network, key, Original(original.model, original.sites, original.example, data))


@pytest.mark.parametrize("path", ["clean", "encrypted"])
def test_contract(path: str) -> None:
    for check in hardening_checks(Calibrate(path=path)):
        check.body()
