"""Duels: what is in a case, what is not, and what becomes of attacks that misbehave."""

import dataclasses
import hashlib
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from deepenc.arena.build import Encryption, _leak, build_case
from deepenc.arena.case import Attack, Claim
from deepenc.arena.checks.base import differing, snapshot
from deepenc.arena.checks.tiny import TinySource, TwoEach, host_defense, tiny_subject
from deepenc.arena.duel import run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.oracle import Oracle as AuthorisedModel
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Meter, Needs, Threat
from deepenc.encryption.defense import Defense
from deepenc.encryption.keys.key import secret_bytes

CPU = torch.device("cpu")
FULL = Threat(name="full", labelled=20, unlabelled=30)


@pytest.fixture(scope="module")
def encryption():
    return Encryption.of(tiny_subject(), host_defense(), hashlib.sha256(b"duel").digest())


def case_of(encryption, threat=FULL, seed=5, leak=6):
    return build_case(encryption, threat, seed, leak, CPU)


def fought(attack, encryption, threat=FULL, seed=5):
    cell = Cell(TinySource(), encryption.defense, Entry(attack=attack, label="it"), threat, 0, 0)
    return run_duel(Duel(cell, "id", bytes(32), seed, 6, None, "cpu"), lambda: encryption)


class _Test(Attack):
    name: ClassVar[str] = "test"

    def attack(self, case):
        return self.act(case)


class Leave(_Test):
    def act(self, case):
        return Claim(network=case.encrypted)


class Boom(_Test):
    def act(self, case):
        raise RuntimeError("planted failure")


class Stop(_Test):
    def act(self, case):
        raise KeyboardInterrupt


class Nothing(_Test):
    def act(self, case):
        return Claim()


class NoClaim(_Test):
    def act(self, case):
        return {"accuracy": 1.0}


class NoNetwork(_Test):
    def act(self, case):
        return Claim(network="resnet")


class Spender(_Test):
    def act(self, case):
        copy = case.copy()
        optimiser = torch.optim.SGD(copy.parameters(), lr=0.1)
        for _ in range(3):
            copy(case.unlabelled[:10].inputs)
            optimiser.step()
        return Claim(network=copy)


class Greedy(_Test):
    @property
    def needs(self):
        return Needs(labelled=1000, allocation=True)

    def act(self, case):
        raise AssertionError("must not be called")


class Oracle(_Test):
    """Cheats with a key that a test hands it."""

    positions: dict[str, tuple[int, ...]] = Field(default_factory=dict)

    def act(self, case):
        scores = {site.name: torch.zeros(site.width) for site in case.sites}
        for name, chosen in self.positions.items():
            scores[name][list(chosen)] = 1
        for parameter in case.encrypted.parameters():
            parameter.data.zero_()  # does not matter: the arena removes from a copy of its own
        return Claim(scores=scores)


class Inverted(nn.Module):
    """Writes to its input, as an in-place activation in front of the first layer does."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.mul_(-1))


class InPlace(_Test):
    def act(self, case):
        if case.oracle is not None:
            case.oracle(case.unlabelled.inputs)
        return Claim(network=Inverted(case.copy()))


class Scribbler(_Test):
    def act(self, case):
        case.example.add_(3)
        case.threat.__dict__["labelled"] = 10**6
        return Claim(network=case.encrypted)


class Dice(_Test):
    def act(self, case):
        value = torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002 - as careless libraries do
        return Claim(scores={s.name: value + torch.rand(s.width) for s in case.sites})


def test_leaving_the_network_alone_measures_it(encryption):
    record = fought(Leave(), encryption)
    victim = tiny_subject().victim
    with torch.no_grad():
        network = case_of(encryption).encrypted
        right = int((network(victim.judge.inputs).argmax(1) == victim.judge.targets).sum())
    assert (record.state, record.score.value, record.score.examples) == ("done", right / 256, 256)
    assert (record.detection, record.removed) == (None, False)
    assert record.key_bits == pytest.approx(encryption.key.entropy)
    assert record.secret_bytes == secret_bytes(encryption.key) > 0
    assert 0 < record.memory < 1


def test_judging_costs_nothing_and_cannot_run_out_of_budget(encryption):
    record = fought(Leave(), encryption, Threat(name="poor", samples=0, steps=0))
    assert (record.state, record.cost.samples) == ("done", 0)


def test_the_right_scores_give_the_victim_back(encryption):
    record = fought(Oracle(positions=dict(encryption.key.positions)), encryption)
    assert record.state == "done", record.reason
    assert (record.score.value, record.removed, record.detection.auc) == (1.0, True, 1.0)
    assert record.detection.bits_left == 0


def test_without_the_configuration_scores_alone_are_not_removed(encryption):
    threat = Threat(name="blind", allocation=False)
    record = fought(Oracle(positions=dict(encryption.key.positions)), encryption, threat)
    assert (record.score, record.removed, record.detection.auc) == (None, False, 1.0)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (Boom(), "planted failure"),
        (Nothing(), "claim of nothing"),
        (NoClaim(), "got dict"),
        (NoNetwork(), "got str"),
    ],
)
def test_misbehaviour_is_a_failed_cell_with_its_traceback(encryption, attack, told):
    record = fought(attack, encryption)
    assert record.state == "failed"
    assert told in record.reason
    assert "Traceback" in record.reason
    assert record.score is None


def test_interrupts_pass(encryption):
    with pytest.raises(KeyboardInterrupt):
        fought(Stop(), encryption)


def test_budgets_hold(encryption):
    assert fought(Spender(), encryption).cost.samples == 30
    assert fought(Spender(), encryption).cost.steps == 3
    for threat in (Threat(name="t", unlabelled=30, samples=29), Threat(name="t", unlabelled=30, steps=2)):
        record = fought(Spender(), encryption, threat)
        assert (record.state, record.score) == ("out_of_budget", None)
        assert threat.name in record.reason


def test_unmet_needs_are_unsupported(encryption):
    record = fought(Greedy(), encryption, Threat(name="bare", allocation=False))
    assert record.state == "unsupported"
    assert "labelled >= 1000 (given 0)" in record.reason
    assert "allocation" in record.reason


def test_a_case_with_nothing_to_attack_is_unsupported(encryption):
    class Pointless(Greedy):
        needs = property(lambda _: Needs())

        def pointless(self, case):
            return f"{len(case.sites)} sites say nothing"

    record = fought(Pointless(), encryption)
    assert (record.state, record.reason) == ("unsupported", "3 sites say nothing")


def test_more_images_than_there_are(encryption):
    record = fought(Leave(), encryption, Threat(name="rich", labelled=200, unlabelled=57))
    assert record.state == "unsupported"
    assert "257" in record.reason and "256" in record.reason


def test_global_generators_are_seeded_inside_and_restored_outside(encryption):
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = fought(Dice(), encryption)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.rand(3)
    assert fought(Dice(), encryption).detection == first.detection


def test_the_victim_stays_as_it_was(encryption):
    model = tiny_subject().victim.model
    before = snapshot(model)
    fought(Oracle(positions=dict(encryption.key.positions)), encryption)
    fought(Spender(), encryption)
    assert differing(before, snapshot(model)) == []


def test_a_network_that_writes_to_its_input_changes_nothing_for_others(encryption):
    first = fought(Leave(), encryption).score
    parts = [tiny_subject().victim.judge, tiny_subject().victim.attacker, tiny_subject().victim.defender]
    before = [(part.inputs.clone(), part.targets.clone()) for part in parts]
    assert fought(InPlace(), encryption).state == "done"
    assert fought(Scribbler(), encryption).state == "done"
    for part, (inputs, labels) in zip(parts, before, strict=True):
        assert torch.equal(part.inputs, inputs) and torch.equal(part.targets, labels)
    assert fought(Leave(), encryption).score == first
    assert FULL.labelled == 20


def test_a_defense_that_writes_to_the_images_changes_nothing_for_others():
    class Painter(TwoEach):
        def place(self, original, rng):
            original.data.inputs.zero_()
            original.example.add_(1)
            return super().place(original, rng)

    before = tiny_subject().victim.defender.inputs.clone()
    Encryption.of(tiny_subject(), host_defense(placement=Painter()), bytes(32))
    assert torch.equal(tiny_subject().victim.defender.inputs, before)


def test_the_authorised_model_does_not_write_to_what_it_is_asked(encryption):
    subject = tiny_subject()
    writing = dataclasses.replace(subject.victim, model=Inverted(subject.victim.model))
    oracle = AuthorisedModel(writing.model, writing.task, CPU, Meter(Threat(name="t", oracle=99)))
    asked = torch.ones(2, 3, 8, 8)
    oracle(asked)
    assert torch.equal(asked, torch.ones(2, 3, 8, 8))


def test_images_are_copies_disjoint_and_never_the_judges(encryption):
    case = case_of(encryption)
    rows = {
        tuple(image.flatten().tolist()) for image in torch.cat([case.labelled.inputs, case.unlabelled.inputs])
    }
    assert len(rows) == 50
    victim = tiny_subject().victim
    assert rows <= {tuple(image.flatten().tolist()) for image in victim.attacker.inputs}
    case.labelled.inputs.zero_()
    assert bool(victim.attacker.inputs.flatten(1).any(1).all())
    assert not bool(case.example.any())


def test_known_positions_are_a_fraction_of_all():
    """Three sites of two channels: a quarter of six is 1.5, rounded half up 2."""
    quarter = Threat(name="quarter", key_fraction=0.25)
    made = Encryption.of(tiny_subject(), host_defense(), bytes(range(32)))
    known = case_of(made, quarter).known
    assert sum(map(len, known.values())) == 2
    assert all(set(chosen) <= set(made.key.positions[name]) for name, chosen in known.items())
    assert case_of(made, quarter, leak=6).known == known
    assert any(case_of(made, quarter, seed=5, leak=n).known != known for n in range(7, 12))
    assert case_of(made, Threat(name="all", key_fraction=1)).known == dict(made.key.positions)


def test_half_of_many_single_channels_is_half():
    leaked = _leak(dict.fromkeys("abcdefgh", (3,)), 0.5, seed=0)
    assert sum(map(len, leaked.values())) == 4


def test_withheld_knowledge_is_not_there(encryption):
    case = case_of(encryption, Threat(name="t", architecture=False, allocation=False))
    assert (case.allocation, case.blank, dict(case.known)) == (None, None, {})
    assert (len(case.labelled), len(case.unlabelled.inputs)) == (0, 0)


def test_blank_networks_are_new_metered_and_repeatable(encryption):
    case = case_of(encryption)
    state = torch.get_rng_state()
    first, again, other = case.blank(1), case.blank(1), case.blank(2)
    assert torch.equal(state, torch.get_rng_state())
    assert differing(snapshot(first), snapshot(again)) == []
    assert "conv1.weight" in differing(snapshot(first), snapshot(other))
    victim = snapshot(tiny_subject().victim.model)
    assert {n: t.shape for n, t in snapshot(first).items()} == {n: t.shape for n, t in victim.items()}
    assert float(first.bn1.running_var.min()) == 1.0
    first(case.labelled.inputs)
    assert case.meter.samples == 20


def test_blank_fills_what_no_layer_resets():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.full((500,), 7.0))
            self.register_buffer("constant", torch.tensor([3.0, 4.0]))
            self.conv = nn.Conv2d(3, 8, 1)
            self.register_buffer("gain", torch.full((8,), 5.0))

    from deepenc.arena.build import Blank
    from deepenc.arena.threat import Meter
    from deepenc.network.sites import Role

    model = Odd()
    encrypted = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    encrypted["gain"] = torch.arange(9.0)  # widened: its order would tell the key
    made = Blank(model, encrypted, {"gain": Role.SCALE}, Meter(FULL))(0)
    token = made.token.detach()
    assert 0.01 < float(token.std()) < 0.03 and float(token.abs().max()) <= 0.04
    assert made.constant.tolist() == [3, 4]
    assert made.gain.tolist() == [1] * 8


def test_blank_begins_norms_at_one_and_tied_weights_as_the_head():
    class LibraryNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((64,), 7.0))
            self.bias = nn.Parameter(torch.full((64,), 7.0))

    from deepenc.arena.build import Blank
    from deepenc.arena.threat import Meter

    model = nn.ModuleDict(
        {"words": nn.Embedding(90, 64), "norm": LibraryNorm(), "head": nn.Linear(64, 90, bias=False)}
    )
    model["head"].weight = model["words"].weight
    made = Blank(model, dict(model.named_parameters()), {}, Meter(FULL))(0)
    assert made["norm"].weight.eq(1).all() and made["norm"].bias.eq(0).all()
    assert made["head"].weight is made["words"].weight
    # Linear draws from ±1/sqrt(64), Embedding would draw from a standard normal distribution.
    assert 0.1 < float(made["head"].weight.detach().abs().max()) <= 0.125


def test_a_case_carries_over_nothing_that_a_defense_left_behind(encryption):
    leaky = {
        n: torch.cat([t.flatten(), torch.ones(9).to(t)])[: t.numel()].view_as(t)
        for n, t in encryption.tensors.items()
    }
    case = case_of(dataclasses.replace(encryption, tensors=leaky))
    for tensor in (*case.encrypted.parameters(), *case.encrypted.buffers()):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor._base is None


def test_the_null_defense_has_nothing_to_find():
    made = Encryption.of(tiny_subject(), Defense.model_validate("null"), bytes(32))
    record = fought(Oracle(), made)
    assert (record.score.value, record.detection, record.protected) == (1.0, None, False)
