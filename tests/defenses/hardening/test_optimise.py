from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.analysis.batchnorm import batch_statistics, reestimate
from deepenc.arena.checks.defenses import hardening_checks
from deepenc.arena.checks.tiny import Noise, TwoEach, tiny_subject
from deepenc.encryption.defense import Defense, Original
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.filling.adversaries import missing
from deepenc.encryption.filling.entries import Confusion, limits
from deepenc.encryption.filling.stealth import penalty
from deepenc.encryption.keys.key import Key
from deepenc.errors import ConfigError
from deepenc.network.structure import named_tensors
from defenses.hardening.optimise import Optimise

Made = tuple[nn.Module, Key, Original]


@pytest.fixture
def encrypted() -> Made:
    subject = tiny_subject()
    original = Original(
        subject.victim.model, subject.sites, subject.victim.example, subject.victim.defender.inputs
    )
    host = Defense(name="t", placement=TwoEach(), weights=Noise())
    network, key = encrypt(original.model, original.example, host, seed=5, sites=subject.sites)
    return network, key, original


def hardened(made: Made, seed: int = 1, **fields: object) -> nn.Module:
    network, key, original = copy.deepcopy(made[0]), made[1], made[2]
    Optimise(**{"steps": 20, **fields}).harden(network, key.layout(), original, np.random.default_rng(seed))
    return network


def accuracy(network: nn.Module) -> float:
    judge = tiny_subject().victim.judge
    with torch.no_grad():
        return (network(judge.inputs).argmax(1) == judge.targets).double().mean().item()


def change(network: nn.Module, original: Original, inputs: Tensor) -> float:
    """Relative squared response change on inputs while BatchNorm normalises by the batch."""
    with torch.no_grad(), batch_statistics(network):
        clean, other = original.model(inputs), network(inputs)
    return float((other - clean).square().sum() / clean.square().sum())


@pytest.mark.parametrize("objective", ["response", "cross-entropy"])
def test_it_does_harm_that_measuring_statistics_anew_does_not_undo(encrypted: Made, objective: str) -> None:
    network, _, original = encrypted
    unseen = tiny_subject().victim.attacker.inputs[:128]
    reestimate(plain := copy.deepcopy(network), unseen)
    harmful = hardened(encrypted, steps=40, objective=objective)
    assert change(harmful, original, unseen) > 2 * change(network, original, unseen)
    reestimate(repaired := copy.deepcopy(harmful), unseen)
    assert accuracy(harmful) < 0.4 and accuracy(repaired) < 0.45 and accuracy(plain) > 0.55


def test_batchnorm_normalises_by_the_batch_while_it_ascends(encrypted: Made) -> None:
    modes = []
    encrypted[0].bn1.register_forward_pre_hook(
        lambda norm, _: modes.append((norm.training, norm.track_running_stats))
    )
    hardened(encrypted, steps=7)
    assert modes == [(True, False)] * 7 + [(False, True)]  # the last measures statistics


def test_more_steps_do_more_harm(encrypted: Made) -> None:
    inputs = encrypted[2].data.inputs
    few, many = (change(hardened(encrypted, steps=n), encrypted[2], inputs) for n in (1, 30))
    assert many > 1.5 * few


def test_confusion_channels_stay_within_the_norms_of_the_real_ones(encrypted: Made) -> None:
    network, layout = hardened(encrypted, quantile=0.75, lr=1.0), encrypted[1].layout()
    allowed = limits(named_tensors(encrypted[2].model), layout.sites, 0.75)
    tensors = network.state_dict()
    for site, wide in zip(layout.sites, layout.widened_sites(), strict=True):
        inserted, at_the_cap = list(layout.positions[site.name]), 0
        for slot, moved in zip(site.slots, wide.slots, strict=True):
            rows = moved.rows(tensors[slot.tensor], wide.width)[inserted]
            least, largest = allowed[site.name, slot]
            if tensors[slot.tensor].ndim > 1:
                assert (rows.norm(dim=1) <= largest * (1 + 1e-5)).all()
                at_the_cap += int((rows.norm(dim=1) > 0.99 * largest).sum())
            elif "running" not in slot.tensor:
                assert rows.min() >= least - 1e-6 and rows.max() <= largest + 1e-6
        assert at_the_cap, "a cap that nothing reaches was not tested"


@pytest.mark.parametrize(
    "fields", [{}, {"gates": True}, {"stealth": 1.0}, {"disguise": True}, {"removal": 0.5}], ids=str
)
def test_only_confusion_entries_change_and_all_else_is_as_it_was(encrypted: Made, fields: dict) -> None:
    made, key, original = encrypted
    made.bn1.momentum, made.bn2.momentum = 0.03, None
    made.conv1.weight.requires_grad_(False)
    network = hardened(encrypted, steps=3, **fields)
    back = decrypt_unverified(network, key)
    victim = original.model.state_dict()
    assert all(torch.equal(tensor, victim[name]) for name, tensor in back.items())
    changed = {
        name for name, t in network.state_dict().items() if not torch.equal(t, made.state_dict()[name])
    }
    assert changed == {name for name in victim if "num_batches" not in name and name != "fc.bias"}
    # A momentum of 0 left behind once made fine-tuning look harmless.
    assert [network.bn1.momentum, network.bn2.momentum, network.bn3.momentum] == [0.03, None, 0.1]
    assert not any(module.training for module in network.modules())
    assert all(getattr(network, f"bn{i}").track_running_stats for i in (1, 2, 3))
    flags = {name: p.requires_grad for name, p in network.named_parameters()}
    assert flags == {name: name != "conv1.weight" for name in flags}
    assert all(p.grad is None and p.is_leaf for p in network.parameters())
    stored = network.bn1.running_mean.clone()
    network.train()(original.data.inputs)
    assert not torch.equal(network.bn1.running_mean, stored)


def decrypt_unverified(network: nn.Module, key: Key) -> dict[str, Tensor]:
    from deepenc.network.surgery import remove

    return remove(network, key.layout()).state_dict()


def test_equal_generators_make_equal_networks(encrypted: Made) -> None:
    one, two, other = (hardened(encrypted, seed=s, steps=4, gates=True).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_own_statistics_agree_with_data_on_the_clean_path(encrypted: Made) -> None:
    network, key, original = hardened(encrypted, steps=5), encrypted[1], encrypted[2]
    inserted = list(key.positions["conv1"])
    with torch.no_grad():
        made = network.conv1(original.data.inputs)[:, inserted]  # nothing comes before the first layer
    assert torch.allclose(network.bn1.running_mean[inserted], made.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(network.bn1.running_var[inserted], made.var((0, 2, 3)), rtol=1e-2)


def test_stealth_trades_harm_for_likeness(encrypted: Made) -> None:
    layout, original = encrypted[1].layout(), encrypted[2]
    open_, hidden = (hardened(encrypted, stealth=weight) for weight in (0.0, 3.0))
    seen, unseen = (float(penalty(dict(n.state_dict()), layout)) for n in (open_, hidden))
    assert unseen < seen / 2
    assert change(hidden, original, original.data.inputs) < change(open_, original, original.data.inputs)


def test_channels_in_disguise_do_not_crowd_at_the_cap(encrypted: Made) -> None:
    layout, original = encrypted[1].layout(), encrypted[2]
    capped, hidden = (
        hardened(encrypted, steps=40, **fields)
        for fields in ({"quantile": 0.5}, {"disguise": True, "stealth": 3.0})
    )
    spread = []
    for network in (capped, hidden):
        rows = network.state_dict()["conv2.weight"].flatten(1).norm(dim=1)
        inserted = list(layout.positions["conv2"])
        real = [channel for channel in range(len(rows)) if channel not in inserted]
        assert rows[inserted].max() <= rows[real].max() * 1.01
        spread.append(float(rows[inserted].std() / rows[real].std()))
    assert spread[0] < 0.1 < spread[1]
    assert change(hidden, original, original.data.inputs) > 2 * change(
        encrypted[0], original, original.data.inputs
    )


def test_as_many_real_channels_are_missing_as_confusion_channels(encrypted: Made) -> None:
    confusion = Confusion(encrypted[0], encrypted[1].layout())
    found = missing(confusion, 0.4, np.random.default_rng(0))
    drawn = [next(found) for _ in range(2000)]
    for site in confusion.sites:
        inserted = list(encrypted[1].positions[site.name])
        silent = 1 - torch.stack([gates[site.name] for gates in drawn]).mean(0)
        assert silent[inserted].numpy() == pytest.approx(0.4, abs=0.05)
        assert float(silent.sum()) == pytest.approx(2 * 0.4 * len(inserted), abs=0.1)
    one, two = (hardened(encrypted, steps=6, removal=share) for share in (0.0, 0.5))
    assert not torch.equal(one.conv1.weight, two.conv1.weight)


def test_a_step_sees_the_whole_network_and_the_next_what_is_left(
    encrypted: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = Confusion.__call__, []

    def note(self: Confusion, *inputs: Any, gates: Any = None) -> Any:
        seen.append(gates is None)
        return run(self, *inputs, gates=gates)

    monkeypatch.setattr(Confusion, "__call__", note)
    hardened(encrypted, steps=5, removal=0.5)
    assert seen == [True, False, True, False, True]


def test_gates_are_learned_against_and_change_the_outcome(encrypted: Made) -> None:
    plain, minmax = (hardened(encrypted, steps=6, gates=gates) for gates in (False, True))
    assert not torch.equal(plain.conv1.weight, minmax.conv1.weight)


def test_without_batchnorm_it_works_as_well(planted: tuple) -> None:
    net, _, sites = planted
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor))) / 5)
    data = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    bare = {
        "name": "t",
        "placement": {"name": "proportional", "sites": "3", "proportion": 0.2},
        "weights": "samp",
    }
    runs = [
        encrypt(net, data, {**bare, "hardening": steps}, seed=0, sites=sites, data=data)
        for steps in ((), (Optimise(steps=20),))
    ]
    with torch.no_grad():
        before, after = ((network(data) - net(data)).norm() for network, _ in runs)
    assert after > 2 * before
    back = decrypt(*runs[1]).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("count", [None, 1])
def test_without_images_it_says_what_to_give(encrypted: Made, count: int | None) -> None:
    network, key, original = encrypted
    data = None if count is None else original.data[:count]
    poor = Original(original.model, original.sites, original.example, data)
    with pytest.raises(ConfigError, match=r"defender's examples.*data="):
        hardened((network, key, poor))


class Wordy(nn.Module):
    """Answers in words."""

    def forward(self, x: Tensor) -> list[str]:
        return ["cat"] * len(x)


def test_a_victim_whose_outputs_cannot_be_compared_is_refused(encrypted: Made) -> None:
    network, key, original = encrypted
    odd = Original(Wordy(), original.sites, original.example, original.data)
    with pytest.raises(ConfigError, match="not a fixed number of values"):
        hardened((network, key, odd))


def test_contract() -> None:
    for check in hardening_checks(Optimise(steps=2)):
        check.body()
