from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.defense import Defense, Gap, Neurons
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout
from deepenc.plugins import build
from defenses.weights.init import Init
from defenses.weights.mixed import Mixed
from defenses.weights.samp import Samp

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
NORM = ("1.weight", "1.bias", "1.running_mean", "1.running_var")


def neurons(net: nn.Module, site: Site, count: int) -> Neurons:
    return Neurons.of(site, Layout.appended((site,), {site.name: count}), net.state_dict())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "weights", [Samp(), Samp(norm_source="joint"), Init(), Mixed(), Mixed(norm_source="joint")]
)
def test_each_gives_tensors_of_the_shapes_and_dtypes_asked_and_changes_nothing(
    planted: Net, weights: Any
) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        net = planted[0].to(dtype)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for site in planted[2]:
            asked = neurons(net, site, 7)
            values = weights.fill(asked, rng(), rng(1))
            assert [v.shape for v in values] == [gap.shape for gap in asked.gaps]
            assert {v.dtype for v in values} == {dtype}
            again = weights.fill(asked, rng(), rng(1))
            assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_samp_draws_every_entry_of_the_same_tensor_with_replacement(planted: Net) -> None:
    asked = neurons(planted[0], planted[2][0], 200)
    for gap, value in zip(asked.gaps, Samp().fill(asked, rng(), rng(1)), strict=True):
        drawn, counts = value.unique(return_counts=True)
        assert torch.isin(drawn, gap.victim).all()
        assert counts.max() > 1
        # 200 draws or more of 20 values: any value left out would be one in 30,000.
        assert len(drawn) == 20 or gap.victim.numel() > 20


def test_samp_draws_uniformly_over_the_whole_tensor_not_the_own_row(planted: Net) -> None:
    asked = neurons(planted[0], planted[2][1], 400)
    value = Samp().fill(asked, rng(), rng(1))[0]
    # 400 x 80 draws of 3200 values: the mean has a standard error of 0.6 % of the range.
    victim = asked.gaps[0].victim
    assert value.mean().item() == pytest.approx(victim.mean().item(), abs=0.02 * float(victim.max()))
    assert value.std().item() == pytest.approx(victim.std().item(), rel=0.02)


def norm_sources(net: nn.Module, values: Any, site: Site) -> Tensor:
    """Which real channel each drawn entry of the four BatchNorm vectors is, ``(4, count)``."""
    state = net.state_dict()
    of = {slot.tensor: value for slot, value in zip(site.slots, values, strict=True)}
    return torch.stack([(of[n][:, None] == state[n][None, :]).float().argmax(1) for n in NORM])


def test_joint_norms_come_from_one_real_channel_and_independent_ones_do_not(planted: Net) -> None:
    net, _, sites = planted
    asked = neurons(net, sites[0], 50)
    joint = norm_sources(net, Samp(norm_source="joint").fill(asked, rng(), rng(1)), sites[0])
    assert (joint == joint[0]).all() and len(joint[0].unique()) > 10
    independent = norm_sources(net, Samp().fill(asked, rng(), rng(1)), sites[0])
    for i in range(4):
        for j in range(i):
            # Two of 20 agree by chance with probability 1/20: 2.5 of 50 are expected.
            assert (independent[i] == independent[j]).sum() < 12


def test_joint_norms_of_a_flattened_map_keep_the_block_together() -> None:
    norm = torch.arange(15.0)  # 4 channels of 3 entries, from entry 3 on
    slots = (Slot("n.weight", 0, Role.SCALE, 3, 3), Slot("n.bias", 0, Role.SHIFT, 3, 3))
    gaps = tuple(Gap(slot, norm + 100 * i, (18,), {}) for i, slot in enumerate(slots))
    values = Samp(norm_source="joint").fill(Neurons(Site("n", 4, slots), 6, gaps), rng(), rng(1))
    blocks = values[0].reshape(6, 3)
    assert torch.equal(blocks, blocks[:, :1] + torch.arange(3.0))
    assert (blocks[:, 0] % 3 == 0).all() and (blocks >= 3).all()
    assert torch.equal(values[1], values[0] + 100)


def test_init_is_kaiming_normal_of_the_victims_fan_in_and_defaults_elsewhere(planted: Net) -> None:
    net, _, (first, second) = planted
    values = dict(
        zip(
            (s.tensor for s in first.slots), Init().fill(neurons(net, first, 500), rng(), rng(1)), strict=True
        )
    )
    assert values["0.weight"].std().item() == pytest.approx(sqrt(2 / 27), rel=0.02)  # 3 channels, 3x3
    assert values["3.weight"].std().item() == pytest.approx(sqrt(2 / 80), rel=0.02)  # 20 channels, 2x2
    assert abs(values["0.weight"].mean().item()) < 0.02
    for name, wanted in {
        "0.bias": 0,
        "1.weight": 1,
        "1.bias": 0,
        "1.running_mean": 0,
        "1.running_var": 1,
    }.items():
        assert (values[name] == wanted).all()
    incoming, bias, outgoing = Init().fill(neurons(net, second, 500), rng(), rng(1))
    assert incoming.std().item() == pytest.approx(sqrt(2 / 80), rel=0.02)
    assert outgoing.std().item() == pytest.approx(sqrt(2 / 40), rel=0.03)
    assert (bias == 0).all()


def test_init_agrees_with_torchs_kaiming_normal(planted: Net) -> None:
    reference = torch.empty(4000, 20, 2, 2)
    torch.nn.init.kaiming_normal_(reference, generator=torch.Generator().manual_seed(0))
    value = Init().fill(neurons(planted[0], planted[2][1], 4000), rng(), rng(1))[0]
    quantiles = torch.linspace(0.01, 0.99, 21)
    pick = torch.randint(value.numel(), (100_000,), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        value.flatten()[pick].quantile(quantiles), reference.flatten()[pick].quantile(quantiles), atol=0.02
    )


@pytest.mark.parametrize(
    ("shape", "dim", "role", "expected"),
    [
        ((40, 20, 3, 3), 0, Role.INCOMING, 180),
        ((40, 20, 3, 3), 1, Role.OUTGOING, 180),
        ((40, 1, 3, 3), 0, Role.INCOMING, 9),  # depthwise
        ((20, 40, 2, 2), 1, Role.INCOMING, 80),  # transposed: inputs first
        ((20, 40, 2, 2), 0, Role.OUTGOING, 80),
        ((7,), 0, Role.OUTGOING, 7),
    ],
)
def test_fan_in(shape: tuple[int, ...], dim: int, role: Role, expected: int) -> None:
    from deepenc.encryption.filling.fills import fan_in

    assert fan_in(Gap(Slot("w", dim, role), torch.empty(shape), shape, {})) == expected


@pytest.mark.parametrize("norms", ["independent", "joint"])
def test_mixed_tosses_one_coin_a_neuron_for_all_its_slots(planted: Net, norms: Any) -> None:
    net, _, sites = planted
    asked = neurons(net, sites[0], 400)
    values = dict(
        zip(
            (s.tensor for s in sites[0].slots),
            Mixed(norm_source=norms).fill(asked, rng(), rng(1)),
            strict=True,
        )
    )
    state = net.state_dict()
    # The planted values are unlike a default, and any float drawn from a normal is hardly one of them.
    sampled = {name: values[name] != wanted for name, wanted in zip(NORM, (1, 0, 0, 1), strict=True)}
    sampled["0.weight"] = torch.isin(values["0.weight"], state["0.weight"]).flatten(1).all(1)
    sampled["3.weight"] = torch.isin(values["3.weight"], state["3.weight"]).transpose(0, 1).flatten(1).all(1)
    sampled["0.bias"] = values["0.bias"] != 0
    coins = sampled.pop("0.weight")
    assert all(torch.equal(coins, other) for other in sampled.values())
    assert 150 < coins.sum() < 250  # five standard deviations of a fair coin


def test_mixed_keeps_blocks_together() -> None:
    slots = (Slot("a", 0, Role.INCOMING), Slot("b", 1, Role.OUTGOING, 0, 3))
    a, b = torch.full((4, 2), 50.0), torch.full((2, 12), 60.0)
    gaps = (Gap(slots[0], a, (30, 2), {}), Gap(slots[1], b, (2, 90), {}))
    first, second = Mixed().fill(Neurons(Site("a", 4, slots), 30, gaps), rng(), rng(1))
    coins = (first == 50).all(1)
    assert torch.equal((second == 60).reshape(2, 30, 3).all(2), coins.expand(2, 30))
    assert 0 < coins.sum() < 30


@pytest.mark.parametrize("name", ["samp", "init", "mixed", "samp:norm_source=joint"])
def test_registered_weights_encrypt_and_come_off_again(planted: Net, name: str) -> None:
    net, inputs, sites = planted
    defense = Defense(name="t", placement="proportional:proportion=0.2", weights=name)
    assert build("weights", defense.weights.spec()) == defense.weights
    encrypted, key = encrypt(net, inputs, defense, seed=0, sites=sites)
    assert key.allocation == {"0": 4, "3": 8}
    state = net.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in decrypt(encrypted, key).state_dict().items())
