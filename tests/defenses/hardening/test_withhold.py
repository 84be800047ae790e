from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepenc.arena.checks.tiny import host_defense, tiny_subject
from deepenc.encryption.defense import Defense
from deepenc.encryption.disk.checkpoint import decrypt_tensors
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys.key import Key, seal, unseal
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError, KeyFileError
from deepenc.network.surgery import remove
from defenses.hardening.withhold import Withhold

NORMS = ("bn1", "bn2", "bn3")


@pytest.fixture(scope="module")
def released() -> tuple[nn.Module, Key, nn.Module, torch.Tensor]:
    subject = tiny_subject()
    victim, images = subject.victim.model, subject.victim.defender.inputs
    network, key = encrypt(
        victim, images[:1], host_defense(hardening=Withhold(images=10**6)), seed=2,
        sites=subject.sites, data=images,
    )  # fmt: skip
    return network, key, victim, images


def test_the_release_has_its_own_statistics(released: tuple[nn.Module, Key, nn.Module, torch.Tensor]) -> None:
    network, _, _, images = released
    seen = {}
    run = copy.deepcopy(network).train()  # each layer normalises by the batch, as when they were measured
    for name in NORMS:
        getattr(run, name).register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: given[0].mean((0, 2, 3))})
        )
    with torch.no_grad():
        run(images)
    for name in NORMS:
        assert torch.allclose(getattr(network, name).running_mean, seen[name], rtol=0.1, atol=0.05)


def test_removing_the_confusion_channels_does_not_bring_the_statistics_back(
    released: tuple[nn.Module, Key, nn.Module, torch.Tensor],
) -> None:
    network, key, victim, _ = released
    guessed = tensors_of(remove(network, key.layout()))
    for name in NORMS:
        assert not torch.allclose(
            guessed[f"{name}.running_var"], getattr(victim, name).running_var, rtol=0.05
        )
        assert torch.equal(guessed[f"{name}.weight"], getattr(victim, name).weight)


def test_the_key_does(released: tuple[nn.Module, Key, nn.Module, torch.Tensor]) -> None:
    network, key, victim, _ = released
    opened = unseal(seal(key, "word", cost=2**10), "word", key.sites)
    assert opened == key
    for found in (tensors_of(decrypt(network, opened)), decrypt_tensors(tensors_of(network), opened)):
        assert found.keys() == tensors_of(victim).keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(victim).items())


def test_what_was_withheld_must_fit(released: tuple[nn.Module, Key, nn.Module, torch.Tensor]) -> None:
    network, key, _, _ = released
    tensors = {name: tensor for name, tensor in tensors_of(network).items() if "running" not in name}
    with pytest.raises(KeyFileError, match="withholds"):
        key.restored(tensors)


def test_a_network_without_batchnorm_has_nothing_to_withhold() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    example = torch.randn(2, 4)
    released, key = encrypt(net, example, host_defense(hardening=Withhold()), seed=0)
    expected, same = encrypt(net, example, host_defense(), seed=0)
    assert key == same and not key.withheld_tensors()
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in released.state_dict().items())


class Reader(nn.Module):
    """A transformer for texts, with LayerNorm alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.words(ids)).mean(1))


def test_strong_protects_a_transformer_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, texts = Reader().eval(), torch.randint(30, (32, 7))
    strong = Defense.of("strong")
    quick = [
        step.model_copy(update={"steps": 2, "batch_size": 8}) if step.name == "optimise" else step
        for step in strong.hardening
    ]
    assert "withhold" in [step.name for step in quick]
    released, key = encrypt(
        model, texts[:1], strong.model_copy(update={"hardening": quick}), seed=0, data=texts
    )
    assert not torch.allclose(released(texts), model(texts), atol=0.01)
    restored = decrypt(released, key)
    assert all(torch.equal(t, restored.state_dict()[n]) for n, t in model.state_dict().items())


def test_without_images() -> None:
    subject = tiny_subject()
    with pytest.raises(ConfigError, match="needs the defender's examples"):
        encrypt(subject.victim.model, subject.victim.example, host_defense(hardening=Withhold()), seed=0)
