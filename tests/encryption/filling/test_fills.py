"""The parts that weights are made of, against slow plain versions and worked-out cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons
from deepenc.encryption.filling import fills
from deepenc.encryption.filling.fills import (
    Floats,
    assemble,
    bootstrapped,
    distinct,
    finished,
    placed,
    real_rows,
)
from deepenc.network.sites import Role, Site, Slot


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(rng(seed).standard_normal(shape)).float()


@pytest.mark.parametrize(
    ("shape", "slot", "width"),
    [
        ((7, 5, 3, 3), Slot("w", 0, Role.INCOMING), 7),
        ((7, 5, 3, 3), Slot("w", 1, Role.OUTGOING), 5),
        ((4, 12), Slot("w", 1, Role.OUTGOING, block=3), 4),
        ((4, 14), Slot("w", 1, Role.OUTGOING, start=2, block=3), 4),
        ((9, 1, 3, 3), Slot("w", 0, Role.INCOMING), 9),
        ((6,), Slot("w", 0, Role.SHIFT), 6),
        ((8,), Slot("w", 0, Role.SHIFT, start=2, block=2), 3),
        ((1, 1, 6), Slot("w", 2, Role.INCOMING), 6),
        ((3, 4, 5), Slot("w", 1, Role.INCOMING), 4),
    ],
)
def test_rows_hold_a_channels_entries_and_go_back_where_they_came_from(
    shape: tuple[int, ...], slot: Slot, width: int
) -> None:
    victim = torch.arange(float(np.prod(shape))).reshape(shape)
    length = width * slot.block
    part = victim.narrow(slot.dim, slot.start, length)
    gap = Gap(slot, victim, tuple(part.shape), {})
    rows = real_rows(gap, width, rng())
    assert rows.ndim == 3 and len(rows) == width
    for channel in range(width):
        own = part.narrow(slot.dim, channel * slot.block, slot.block)
        assert set(rows[channel].flatten().tolist()) == set(own.flatten().tolist())
    assert torch.equal(placed(rows, gap), part)


def test_a_partner_s_entries_are_its_unit() -> None:
    conv, flat = normal(7, 5, 3, 3), normal(4, 12)
    rows = real_rows(Gap(Slot("w", 1, Role.OUTGOING), conv, (7, 2, 3, 3), {}), 5, rng())
    assert torch.equal(rows[3, 6], conv[6, 3].flatten())
    rows = real_rows(Gap(Slot("w", 1, Role.OUTGOING, block=3), flat, (4, 6), {}), 4, rng())
    assert torch.equal(rows[2, 1], flat[1, 6:9])


def test_partners_that_another_site_adds_are_made_like_real_ones_which_stay_themselves() -> None:
    victim, kept = normal(7, 5, 3, 3), torch.tensor([1, 2, 4, 5, 7])
    gap = Gap(Slot("w", 0, Role.INCOMING), victim, (2, 8, 3, 3), {1: kept})
    made = set()
    for seed in range(20):
        rows = real_rows(gap, 7, rng(seed))
        assert rows.shape == (7, 8, 9)
        assert torch.equal(rows[:, kept], victim.flatten(2))
        like = [(rows[:, partner] == victim.flatten(2).transpose(0, 1)).all(2).all(1) for partner in range(8)]
        assert all(real.any() for real in like)
        made.add(tuple(int(like[partner].nonzero()[0]) for partner in (0, 3, 6)))
    assert len(made) > 10


def test_bootstrapped_units_are_real_ones_with_the_same_partner() -> None:
    real = normal(6, 4, 9)
    rows = bootstrapped(real, 500, rng())
    share = torch.zeros(6)
    for partner in range(4):
        same = (rows[:, partner, None] == real[None, :, partner]).all(2)
        assert same.any(1).all()
        share += same.double().mean(0) / 4
    assert torch.allclose(share, torch.full((6,), 1 / 6), atol=0.04)  # four standard errors of 2000 draws
    sources = (rows[:, :2, None] == real.transpose(0, 1)[None, :2]).all(3).double().argmax(2)
    assert np.corrcoef(sources.T.numpy())[0, 1] == pytest.approx(0, abs=0.15)


def test_distinct_channels_repeat_only_after_all_were_drawn() -> None:
    drawn = distinct(5, 12, rng())
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert len(drawn) == 12 and len({tuple(distinct(5, 3, rng(s))) for s in range(50)}) > 20


def test_jitter_has_the_deviation_asked_for_and_keeps_signs_and_common_values() -> None:
    victim = torch.cat([torch.zeros(500), normal(500)])
    rows = victim.repeat(20).view(20, 1, 1000)
    near = Floats(victim).jittered(rows, 0.1, rng())
    ratio = near[..., 500:] / rows[..., 500:]
    assert ratio.mean().item() == pytest.approx(1, abs=0.004)
    assert ratio.std().item() == pytest.approx(0.1, rel=0.03)
    assert (near[..., :500] == 0).all()
    assert (Floats(victim).jittered(rows, 0.5, rng()).sign() == rows.sign()).all()
    assert torch.equal(Floats(victim).jittered(rows, 0.0, rng()), rows)


def test_values_that_are_the_victims_move_by_one_float() -> None:
    victim = torch.tensor([1.0, 1.0 + 2**-23, 5.0, 0.0, 0.0])
    moved = Floats(victim).apart(torch.tensor([1.0, 5.0, 0.0, 2.0]))
    assert moved.tolist() == [1 + 2**-22, 5 + 2**-21, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_made_up_values_repeat_as_often_as_real_ones(dtype: torch.dtype) -> None:
    victim = normal(40_000).to(dtype)
    made = Floats(victim).jittered(victim.view(40, 1, 1000), 0.1, rng()).to(dtype)
    values, counts = victim.unique(return_counts=True)
    repeated = torch.isin(victim, values[counts > 1]).double().mean().item()
    # Real ones meet 39,999 others, these 40,000.
    assert torch.isin(Floats(victim).apart(made), victim).double().mean().item() == pytest.approx(
        repeated, abs=0.02
    )


def test_finished_rows_are_of_the_victims_type_and_range() -> None:
    slot = Slot("w", 0, Role.INCOMING)
    half = finished(torch.tensor([[[1e9, -0.0]]]), Gap(slot, torch.ones(3, 2).half(), (1, 2), {}))
    assert half.dtype == torch.float16 and half.tolist() == [[65504.0, 0.0]]
    assert not torch.signbit(half[0, 1])
    whole = finished(
        torch.tensor([[[3.6, 900.0]]]),
        Gap(slot, torch.tensor([[1, 2], [50, 7]], dtype=torch.int8), (1, 2), {}),
    )
    assert whole.dtype == torch.int8 and whole.tolist() == [[4, 50]]


def asked(count: int) -> Neurons:
    """Five channels with a bias and a BatchNorm; entry c of vector v is 10 v + c, to be told apart."""
    roles = (Role.BIAS, Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE)
    gaps = [Gap(Slot("w", 0, Role.INCOMING), normal(5, 3), (count, 3), {})]
    for number, role in enumerate(roles, 1):
        gaps.append(Gap(Slot(role, 0, role), 10.0 * number + torch.arange(5), (count,), {}))
    return Neurons(Site("s", 5, tuple(gap.slot for gap in gaps)), count, tuple(gaps))


def test_entries_other_than_weights_come_from_where_they_should() -> None:
    neurons, models = asked(40), distinct(5, 40, rng())

    def vectors(norms: fills.NormFill) -> Tensor:
        values = assemble(neurons, rng(), lambda gap, real: real[models], models, norm_source=norms)
        return torch.stack(values[1:])

    offsets = torch.arange(1, 6)[:, None] * 10.0
    # One float away from a real one.
    joint = (vectors("joint") - offsets).round()
    assert torch.equal(joint, torch.from_numpy(models).float().expand(5, 40))
    own = (vectors("independent") - offsets).round()
    assert set(own.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert all((own[a] == own[b]).sum() < 20 for a in range(5) for b in range(a))  # 8 by chance
    assert torch.equal(vectors("default"), torch.tensor([0.0, 1, 0, 0, 1])[:, None].expand(5, 40))


def test_a_group_shares_its_models_entries() -> None:
    neurons, groups = asked(6), np.array([0, 1, 1, 0, 2, 2])
    for norms in ("joint", "independent"):
        values = assemble(
            neurons,
            rng(),
            lambda gap, real: real[[0] * 6],
            np.array([4, 2, 0]),
            norm_source=norms,
            groups=groups,
        )
        for value in values[1:]:
            assert value[0] == value[3] and value[1] == value[2] and value[4] == value[5]
