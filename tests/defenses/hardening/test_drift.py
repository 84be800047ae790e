from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from deepenc.arena.build import Encryption
from deepenc.arena.checks.tiny import Noise, TwoEach, host_defense, tiny_subject
from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError, KeyFileError
from defenses.hardening.drift import Drift, _turned
from defenses.hardening.permute import Permute
from defenses.hardening.withhold import Withhold


def tuned(model: nn.Module, size: float = 0.03) -> nn.Module:
    """As after a little training: every parameter has moved, by a part of its tensor's size."""
    torch.manual_seed(1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += size * parameter.abs().mean() * torch.randn(parameter.shape)
    return moved


def test_rows_turn_as_their_donors_did() -> None:
    torch.manual_seed(0)
    own, old, step = torch.randn(3, 5, 40, dtype=torch.float64)
    new = old + 0.2 * step
    moved = _turned(own, old, new)
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(cosine(own, moved), cosine(old, new))
    assert torch.allclose(moved.norm(dim=1) / own.norm(dim=1), new.norm(dim=1) / old.norm(dim=1))


def test_an_unchanged_model_gives_the_same_release() -> None:
    subject = tiny_subject()
    model, example, data = subject.victim.model, subject.victim.example, subject.victim.defender.inputs
    first, key = encrypt(model, example, host_defense(hardening=Drift()), seed=0, sites=subject.sites)
    second, other = reshelter(
        model, key, host_defense(hardening=Drift()), example=example, previous=first, seed=1, data=data
    )
    assert replace(other, binding=key.binding) == key, "but for what signs its header"
    assert all(torch.equal(tensors_of(second)[name], tensor) for name, tensor in tensors_of(first).items())


@pytest.mark.parametrize("more", [(), (Permute(),), (Withhold(),)])
def test_confusion_channels_move_like_real_ones(more: tuple[object, ...]) -> None:
    subject = tiny_subject()
    model, example, data = subject.victim.model, subject.victim.example, subject.victim.defender.inputs
    defense = Defense(name="t", placement=TwoEach(), weights=Noise(), hardening=(Drift(), *more))
    first, key = encrypt(model, example, defense, seed=0, sites=subject.sites, data=data)
    later = tuned(model)
    second, other = reshelter(later, key, defense, example=example, previous=first, seed=1, data=data)
    assert other.positions == key.positions
    assert other.arrangement == key.arrangement
    back = tensors_of(decrypt(second, other))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors_of(later).items())
    before, after = tensors_of(first), tensors_of(second)
    for site in subject.sites:
        rows, moved = (state[f"{site.name}.weight"].flatten(1) for state in (before, after))
        far = (moved - rows).norm(dim=1) / rows.norm(dim=1)
        inserted = list(key.positions[site.name])
        real = [channel for channel in range(len(rows)) if channel not in inserted]
        assert far[real].min() / 2 < far[inserted].min()
        assert far[inserted].max() < 2 * far[real].max()


@pytest.mark.parametrize(("step", "told"), [(None, True), (Drift(), False)])
def test_what_two_releases_tell(step: Drift | None, told: bool) -> None:
    """Redrawn, the confusion channels are those that are in one release only; moved, they are in both."""
    subject = tiny_subject()
    encryption = Encryption.of(subject, host_defense(hardening=step), hashlib.sha256(b"x").digest())
    (other,) = encryption.releases(1, 20)
    one, two = encryption.tensors, other.tensors
    for site in subject.sites:
        rows, others = (state[f"{site.name}.weight"].flatten(2) for state in (one, two))
        inserted = list(encryption.key.positions[site.name])
        moved = (rows - others).flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
        assert (encryption.key.positions[site.name] == other.key.positions[site.name]) is not told
        # A channel drawn again at the same place changes by about its own size, and a half is a safe bound.
        assert (moved[inserted].max() < 0.5) is not told


def test_only_a_defense_that_follows_can() -> None:
    subject = tiny_subject()
    model, example = subject.victim.model, subject.victim.example
    network, key = encrypt(model, example, host_defense(), seed=0, sites=subject.sites)
    with pytest.raises(ConfigError, match="follows the last release"):
        reshelter(model, key, host_defense(), example=example, previous=network)
    drifting = host_defense(hardening=Drift())
    with pytest.raises(ConfigError, match="rotated"):
        reshelter(model, key, drifting, example=example, previous=network, rotate=True)
    other, _ = encrypt(model, example, host_defense(), seed=1, sites=subject.sites)
    with pytest.raises(KeyFileError):
        reshelter(model, key, drifting, example=example, previous=other)


def test_what_was_withheld_before_it_would_be_released_later() -> None:
    subject = tiny_subject()
    model, example, data = subject.victim.model, subject.victim.example, subject.victim.defender.inputs
    right, wrong = (
        Defense(name="t", placement=TwoEach(), weights=Noise(), hardening=steps)
        for steps in ((Drift(), Withhold()), (Withhold(), Drift()))
    )
    with pytest.raises(ConfigError, match="put 'withhold' behind 'drift'"):
        encrypt(model, example, wrong, seed=0, sites=subject.sites, data=data)
    first, key = encrypt(model, example, right, seed=0, sites=subject.sites, data=data)
    with pytest.raises(ConfigError, match="put 'withhold' behind 'drift'"):
        reshelter(model, key, wrong, example=example, previous=first, seed=1, data=data)
