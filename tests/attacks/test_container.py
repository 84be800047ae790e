"""What is stored otherwise is seen; weak seeds are found by trying; a sound encryption shows nothing."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import deepenc
from attacks.container import Container, unusual
from deepenc.analysis.storage import among, hidden, shared_bits, subnormal, trailing_zeros
from deepenc.arena.case import Case
from deepenc.encryption.defense import Defense

BOTH = {"conv1": 1.0, "conv2": 1.0}
SAMP = {
    "name": "test",
    "placement": {"name": "proportional", "proportion": 0.25},
    "weights": {"name": "samp"},
}


def noise(slot, shape, victim, generator):
    return victim.std() * torch.randn(shape, generator=generator)


def through(dtype):
    """Noise that went through a type of less precision."""
    return lambda *about: noise(*about).to(dtype).float()


def sparse(*about):
    values = noise(*about)
    return values * (torch.arange(values.numel()).view(values.shape) % 3 > 0)


def subnormals(*about):
    values = noise(*about)
    return torch.where(torch.arange(values.numel()).view(values.shape) % 3 > 0, values, 1e-40)


def repeated(*about):
    """Few distinct values, each with all its bits."""
    values = noise(*about)
    return values.flatten()[torch.arange(values.numel()) % 2].view(values.shape)


def one_stream(slot, shape, victim, generator):
    """The generator starts again for every tensor."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


FILLS = [through(torch.float16), through(torch.bfloat16), sparse, subnormals, repeated, one_stream]


@pytest.mark.parametrize("fill", FILLS)
def test_what_is_stored_otherwise_is_found(plant, fill):
    planted = plant(fill)
    assert planted.auc(Container().attack(planted.case).scores) == BOTH


def test_real_weights_of_less_precision_give_the_rest_away(plant, random_network):
    network = random_network(12)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().float())
    planted = plant(noise, network=network)
    assert planted.auc(Container().attack(planted.case).scores) == BOTH


def test_nothing_is_seen_where_all_is_stored_alike(plant, random_network):
    positions = {"conv1": tuple(range(0, 200, 4)), "conv2": tuple(range(1, 190, 5))}

    def alike(slot, shape, victim, generator):
        return 0.1 * torch.randn(shape, generator=generator)

    planted = plant(alike, network=random_network(150), width=150, positions=positions)
    # Two sites of 50 and 38 among 190 and more: the deviation of an AUC is below 0.05.
    for auc in planted.auc(Container().attack(planted.case).scores).values():
        assert 0.35 < auc < 0.65


def test_gradients_that_were_left_are_seen(plant):
    planted = plant()
    weight = planted.case.encrypted.conv1.weight
    weight.grad = torch.ones_like(weight)
    weight.grad[list(planted.positions["conv1"])] = 0
    assert planted.auc(Container().attack(planted.case).scores)["conv1"] == 1.0


def test_an_original_that_lies_about_is_seen(plant, trained):
    planted = plant()
    weight, original = planted.case.encrypted.conv1.weight, trained.conv1.weight.detach()
    storage = torch.cat([original.flatten(), weight.detach().flatten()])
    planted.case.encrypted.conv1.weight = torch.nn.Parameter(storage[original.numel() :].view(weight.shape))
    assert torch.equal(hidden(planted.case.encrypted.conv1.weight), original.flatten())
    assert planted.auc(Container().attack(planted.case).scores)["conv1"] == 1.0


def encrypted(plant, trained, weights="samp", **how) -> tuple[Case, dict]:
    """A toy network encrypted by the public tool, as a case."""
    defense = Defense.of(SAMP | {"weights": {"name": weights}})
    planted = plant(trials=how.pop("trials", 10))
    sites = tuple(deepenc.find_sites(trained, planted.case.example))
    network, key = deepenc.encrypt(trained, planted.case.example, defense, sites=sites, **how)
    case = replace(
        planted.case,
        encrypted=network.eval(),
        sites=key.layout().widened_sites(),
        allocation=key.allocation,
        defense=defense.spec(),
    )
    return case, dict(key.positions)


@pytest.mark.parametrize("weights", ["samp", "init", "mixed"])
def test_a_small_seed_is_found(plant, trained, weights):
    case, positions = encrypted(plant, trained, weights, seed=3)
    scores = Container().attack(case).scores
    for name, chosen in positions.items():
        top = scores[name].argsort(descending=True)[: len(chosen)]
        assert sorted(top.tolist()) == list(chosen)
    assert case.meter.trials == 4


@pytest.mark.parametrize(
    ("how", "tried"),
    [
        ({"seed": 30}, 10),
        ({"seed": 3, "trials": 3}, 3),
        ({"seed": 3, "trials": 0}, 0),
        ({"secret": b"s" * 32}, 10),
    ],
)
def test_other_secrets_are_not_found(plant, trained, how, tried):
    case, _ = encrypted(plant, trained, **how)
    scores = Container().attack(case).scores
    assert case.meter.trials == tried
    # No more is suspected than without any seeds.
    assert all(torch.equal(score, scores[n]) for n, score in Container(seeds=0).attack(case).scores.items())


def test_seeds_are_not_tried_where_it_is_pointless(plant, trained):
    case, _ = encrypted(plant, trained, seed=3)
    for less in (
        {"allocation": None},
        {"defense": {"name": "planted"}},
        {"defense": Defense.of(None).spec()},
    ):
        Container().attack(replace(case, **less))
    Container(seeds=0).attack(case)
    assert case.meter.trials == 0


def test_the_case_is_left_alone_and_all_is_repeatable(plant, trained):
    case, _ = encrypted(plant, trained, seed=30, trials=100)
    before = {name: t.clone() for name, t in case.encrypted.state_dict().items()}
    first, second = (Container(seeds=5).attack(case).scores for _ in range(2))
    assert all(torch.equal(score, second[name]) for name, score in first.items())
    assert all(torch.equal(t, before[n]) for n, t in case.encrypted.state_dict().items())
    assert case.meter.samples == 0


def plain_zeros(value):
    """Trailing zeros of a float32's mantissa, the slow way."""
    (number,) = struct.unpack("<I", struct.pack("<f", value))
    mantissa = format(number & (2**23 - 1), "023b")
    return len(mantissa) - len(mantissa.rstrip("0"))


def test_trailing_zeros_are_those_of_the_bits():
    values = torch.tensor([1.0, 1.5, 0.1, -0.3, 3.0, 1e-40, 0.0])
    assert trailing_zeros(values).tolist() == [plain_zeros(v) for v in values.tolist()]
    assert trailing_zeros(torch.tensor([1.0]).double()).item() == 52
    assert trailing_zeros(torch.tensor([0.1]).bfloat16().float()).item() >= 16
    assert trailing_zeros(torch.tensor([12], dtype=torch.int8)).item() == 2


def test_subnormals_are_below_the_least_normal_number():
    tiny = float(np.finfo(np.float32).tiny)
    assert subnormal(torch.tensor([0.0, tiny, tiny / 2, -tiny / 4, 1.0])).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert not subnormal(torch.tensor([0, 1])).any()


def test_shared_bits_are_those_of_two_tensors():
    tensors = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([3.0]).double()]
    assert shared_bits(tensors).tolist() == [torch.tensor(1.0).view(torch.int32).item()]
    assert not len(shared_bits([]))
    values = torch.randint(-20, 20, (50,), generator=torch.Generator().manual_seed(0)).float()
    known = shared_bits([values[:25], values[25:]])
    both = set(values[:25].tolist()) & set(values[25:].tolist()) - {0.0}
    assert among(values, known).tolist() == [value in both for value in values.tolist()]
    assert not among(values, shared_bits([])).any()


def test_compression_is_zlibs(plant):
    rows = [torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 50)]
    stored = [rows[0][c].numpy().tobytes() + bytes(200) for c in range(3)]
    assert Container()._compressed(rows).tolist() == [len(zlib.compress(s)) / 232 for s in stored]
    assert Container(prefix=32)._compressed(rows)[0] == len(zlib.compress(stored[0][:32])) / 32


def test_unusual_by_hand():
    # The median is 1, the distances 1 0 1 9 0, their median 1.
    scores = unusual(torch.tensor([0.0, 1.0, 2.0, 10.0, 1.0]))
    assert scores.tolist() == pytest.approx([1 / 1.4826, 0, 1 / 1.4826, 9 / 1.4826, 0])
    assert unusual(torch.ones(4)).tolist() == [0.0] * 4
    assert unusual(torch.tensor([3.0, 3.0, 3.0, 4.0, 1.0])).tolist() == [0.0, 0.0, 0.0, 5.0, 10.0]
