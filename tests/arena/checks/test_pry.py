"""The prying attack finds leaks that were planted, and nothing where there is none."""

import dataclasses
import hashlib

import pytest
import torch
from torch import nn

from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.pry import Pry, pry
from deepenc.arena.checks.tiny import TinySource, host_defense, tiny_subject
from deepenc.arena.entry import Entry
from deepenc.arena.metrics import checked_scores, detection
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.seeds import Roots

THREAT = Threat(name="prying", labelled=128, unlabelled=16)
SEED = 987654321


def make(secret=None):
    return Encryption.of(tiny_subject(), host_defense(), secret or hashlib.sha256(b"pry").digest())


def case_of(encryption):
    return build_case(encryption, THREAT, SEED, 3, torch.device("cpu"))


def auc(found, case, encryption):
    scores = checked_scores(found.scores, case.sites, "pry")
    return detection(scores, case.sites, encryption.key.positions).auc


@pytest.fixture
def encryption():
    return make()


def test_nothing_is_found_in_a_case_as_the_arena_makes_it(encryption):
    case = case_of(encryption)
    found = pry(case)
    assert found.notes == []
    assert not found.anything
    assert not any(scores.any() for scores in Pry().attack(case).scores.values())


def leave_attribute(case, key):
    case.encrypted.conv1.hidden = key.positions["conv1"]


def leave_mapping(case, key):
    case.encrypted.positions = dict(key.positions)


def leave_set(case, key):
    case.encrypted.bn2.extra = {"deep": [set(key.positions["conv2"])]}


def leave_mask(case, key):
    mask = torch.zeros(case.sites[2].width, dtype=torch.bool)
    mask[list(key.positions["conv3"])] = True
    case.encrypted.conv3.mask = mask


def leave_closure(case, key):
    chosen = list(key.positions["conv1"])
    case.encrypted.register_forward_hook(lambda *_: chosen and None)


def leave_default(case, key):
    def hook(*_, chosen=key.positions["conv1"]):
        return None

    case.encrypted.fc.register_forward_hook(hook)


def leave_on_tensor(case, key):
    case.encrypted.conv1.weight.origin = key.positions["conv1"]


def leave_gradient(case, key):
    weight = case.encrypted.conv1.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[list(key.positions["conv1"])] = 1


@pytest.mark.parametrize(
    "leak",
    [
        leave_attribute,
        leave_mapping,
        leave_set,
        leave_mask,
        leave_closure,
        leave_default,
        leave_on_tensor,
        leave_gradient,
    ],
)
def test_planted_leaks_are_found(encryption, leak):
    case = case_of(encryption)
    leak(case, encryption.key)
    found = pry(case)
    assert found.notes
    assert auc(found, case, encryption) > 0.6


def test_a_view_into_a_storage_with_the_original_behind_it(encryption):
    case = case_of(encryption)
    weight = case.encrypted.conv1.weight.detach()
    original = tiny_subject().victim.model.conv1.weight.detach()
    together = torch.cat([weight.flatten(), original.flatten()])
    case.encrypted.conv1.weight = nn.Parameter(together[: weight.numel()].view_as(weight))
    found = pry(case)
    assert any("larger than itself" in note for note in found.notes)
    top = found.scores["conv1"].topk(2).indices.sort().values
    assert tuple(top.tolist()) == encryption.key.positions["conv1"]


def test_memory_that_two_tensors_share_and_layouts_are_noted(encryption):
    case = case_of(encryption)
    case.encrypted.bn1.running_var.data = case.encrypted.bn1.running_mean.data
    case.encrypted.conv2.weight.data = case.encrypted.conv2.weight.data.to(memory_format=torch.channels_last)
    notes = " ".join(pry(case).notes)
    assert "shares memory" in notes
    assert "not laid out" in notes


@pytest.mark.parametrize(
    "secret",
    [
        (3).to_bytes(32, "big"),
        hashlib.sha256(str(SEED).encode()).digest(),
        hashlib.sha256(SEED.to_bytes(8, "big")).digest(),
        hashlib.sha256(b"deepenc seed 2").digest(),
    ],
)
def test_secrets_that_follow_from_a_seed(secret):
    encryption = make(secret)
    case = case_of(encryption)
    found = pry(case)
    assert any("follows from a seed" in note for note in found.notes)
    assert auc(found, case, encryption) == 1


def duel_of(seed):
    """A case as a run with `seed:` in its configuration makes it, and its encryption."""
    cell = Cell(TinySource(), host_defense(), Entry(attack=Pry()), THREAT, 1, 0)
    duel = Duel.of(cell, "fingerprint", Roots.of_seed(seed), None, "cpu")
    encryption = Encryption.of(tiny_subject(), host_defense(), duel.secret)
    return encryption, build_case(encryption, THREAT, duel.seed, duel.leak_seed, torch.device("cpu"))


def test_the_seed_of_an_attacker_does_not_tell_that_of_the_experiment(monkeypatch):
    monkeypatch.setattr(Defense, "model_validate", lambda spec: host_defense())
    encryption, case = duel_of(2)
    found = pry(case, TinySource())
    assert found.notes == [] and not found.anything
    # Were the attackers' seeds derived from the experiment's as well, guesses could be confirmed.
    slow = Roots.of_seed
    monkeypatch.setattr(Roots, "of_seed", lambda seed: Roots(slow(seed).defender, slow(seed).defender))
    encryption, case = duel_of(2)
    found = pry(case, TinySource())
    assert found.notes == ["case.seed tells the seed of the experiment, from which the secret follows"]
    assert auc(found, case, encryption) == 1


def test_a_field_of_the_case_itself(encryption):
    case = dataclasses.replace(case_of(encryption), known=encryption.key.positions)
    assert auc(pry(case), case, encryption) == 1


def test_what_a_hardening_leaves_on_the_network_does_not_reach_a_case(encryption):
    """The planted attribute is on the defender's network; the case is made from the tensors alone."""
    victim = tiny_subject().victim
    assert not hasattr(victim.model, "positions")
    case = case_of(encryption)
    assert vars(case.encrypted).keys() == vars(victim.model).keys()
