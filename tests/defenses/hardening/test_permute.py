from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deepenc.encryption.defense import Defense, Hardening, Original
from deepenc.encryption.disk.checkpoint import decrypt_tensors
from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
from deepenc.encryption.keys.key import seal, unseal
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError, KeyFileError
from deepenc.network.find import find_sites
from deepenc.network.surgery import remove
from deepenc.plugins import build
from deepenc.victims.models import CifarResNet
from defenses.hardening.permute import Permute


def defense(*steps: Hardening) -> Defense:
    return Defense(
        name="t", placement=build("placement", "absolute"), weights=build("weights", "samp"), hardening=steps
    )


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = CifarResNet(8, channels=1).train()
    for _ in range(3):
        model(torch.randn(16, 1, 16, 16))
    return model.eval(), torch.randn(4, 1, 16, 16)


def test_the_victims_channels_move_and_come_back(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = resnet
    network, key = encrypt(model, inputs, defense(Permute(powers=2)), seed=0)
    arranged = remove(network, key.layout())
    before, after = tensors_of(model), tensors_of(arranged)
    sites = find_sites(model, inputs)
    assert set(key.arrangement.order) == set(key.arrangement.powers) == {site.name for site in sites}
    for site in sites:
        rows, moved = before[f"{site.name}.weight"], after[f"{site.name}.weight"]
        assert not torch.equal(rows, moved)
    assert torch.allclose(arranged(inputs), model(inputs), rtol=1e-3, atol=1e-4)
    back = tensors_of(decrypt(network, key))
    assert all(torch.equal(back[name], tensor) for name, tensor in before.items())
    from_tensors = decrypt_tensors(tensors_of(network), key)
    assert all(torch.equal(from_tensors[name], tensor) for name, tensor in before.items())


def test_the_sealed_key_keeps_the_arrangement(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = resnet
    network, key = encrypt(model, inputs, defense(Permute()), seed=0)
    opened = unseal(seal(key, "word", cost=2**10), "word", key.sites)
    assert opened == key
    back = tensors_of(decrypt(network, opened))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors_of(model).items())


def test_a_forged_arrangement_is_refused(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = resnet
    _, key = encrypt(model, inputs, defense(Permute()), seed=0)
    name = next(iter(key.arrangement.order))
    object.__setattr__(key.arrangement, "order", {name: (0, 0, 0)})
    with pytest.raises(KeyFileError, match="does not fit"):
        unseal(seal(key, "word", cost=2**10), "word", key.sites)


def test_reshelter_keeps_the_arrangement_and_rotating_draws_another(
    resnet: tuple[nn.Module, torch.Tensor],
) -> None:
    model, inputs = resnet
    _, key = encrypt(model, inputs, defense(Permute()), seed=0)
    _, kept = reshelter(model, key, defense(Permute()), example=inputs, seed=1)
    network, other = reshelter(model, key, defense(Permute()), example=inputs, seed=1, rotate=True)
    assert kept.arrangement == key.arrangement
    assert other.arrangement != key.arrangement
    back = tensors_of(decrypt(network, other))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors_of(model).items())


def test_two_arranging_steps_are_refused(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="twice"):
        encrypt(*resnet, defense(Permute(), Permute()), seed=0)


def test_powers_of_zero_change_the_order_alone(resnet: tuple[nn.Module, torch.Tensor]) -> None:
    model, inputs = resnet
    original = Original(model, tuple(find_sites(model, inputs)), inputs)
    wanted = Permute(powers=0).arrange(original, np.random.default_rng(0))
    assert wanted.order
    assert not wanted.powers
