"""Weights beyond the paper's: what each promises, against the victim's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from deepenc.arena.checks.contract import run_checks
from deepenc.encryption.defense import Defense, Neurons, Weights
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout
from defenses.weights.conditional import Conditional, directions
from defenses.weights.decoys import Decoys
from defenses.weights.entangled import Entangled, grouped
from defenses.weights.kernels import Kernels
from defenses.weights.matched import Matched, moments
from defenses.weights.neurons import Recombined
from defenses.weights.samp import Samp
from defenses.weights.smoothed import Smoothed, between

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
ALL: list[Weights] = [
    Smoothed(), Smoothed(form="density", norm_source="independent"), Kernels(),
    Kernels(norm_source="default"), Recombined(), Recombined(norm_source="independent"), Matched(),
    Matched(norm_source="default"), Conditional(), Conditional(form="gaussian"),
    Conditional(form="gaussian", norm_source="default"),
    Conditional(form="gaussian", norm_source="independent", share=1), Decoys(), Decoys(outgoing="noisy"),
    Entangled(), Entangled(group=3, norm_source="independent"),
]  # fmt: skip
every = pytest.mark.parametrize("weights", ALL, ids=repr)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(rng(seed).standard_normal(shape)).float()


def ask(tensors: dict[str, Tensor], site: Site, count: int) -> Neurons:
    return Neurons.of(site, Layout.appended((site,), {site.name: count}), tensors)


def filled(
    weights: Weights, tensors: dict[str, Tensor], site: Site, count: int, seed: int = 0
) -> dict[str, Tensor]:
    values = weights.fill(ask(tensors, site, count), rng(seed), rng(seed + 100))
    return dict(zip((slot.tensor for slot in site.slots), values, strict=True))


def layer(
    width: int = 30, inputs: int = 8, outputs: int = 6, kernel: int = 3
) -> tuple[dict[str, Tensor], Site]:
    """A convolution with BatchNorm whose channels have sizes of their own, shared by all they have."""
    size = (0.6 * normal(width, seed=1)).exp()
    profile = torch.linspace(0.2, 2, inputs)
    tensors = {
        "in": normal(width, inputs, kernel, kernel, seed=2)
        * size[:, None, None, None]
        * profile[:, None, None],
        "bias": normal(width, seed=3),
        "scale": size * (1 + 0.05 * normal(width, seed=4)),
        "shift": normal(width, seed=5),
        "mean": normal(width, seed=6),
        "variance": (normal(width, seed=7)).exp(),
        "out": normal(outputs, width, kernel, kernel, seed=8) * size[:, None, None],
    }
    roles = (
        Role.INCOMING, Role.BIAS, Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE, Role.OUTGOING,
    )  # fmt: skip
    slots = tuple(Slot(name, int(name == "out"), role) for name, role in zip(tensors, roles, strict=True))
    return tensors, Site("s", width, slots)


VECTORS = ("bias", "scale", "shift", "mean", "variance")


# Every one of them


def test_a_form_that_is_no_default_keeps_the_contract() -> None:
    """Defaults are checked with all registered plugins."""
    weights = Conditional(form="gaussian", norm_source="independent")
    assert [result for result in run_checks(weights) if not result.passed] == []


@every
def test_each_gives_shapes_and_types_asked_and_the_same_from_the_same_generator(
    planted: Net, weights: Weights
) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        net = planted[0].to(dtype)
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for site in planted[2]:
            for count in (1, 5):
                neurons = ask(net.state_dict(), site, count)
                values = weights.fill(neurons, rng(), rng(100))
                assert [v.shape for v in values] == [gap.shape for gap in neurons.gaps]
                assert {v.dtype for v in values} == {dtype}
                assert all(torch.isfinite(v).all() for v in values)
                again = weights.fill(neurons, rng(), rng(100))
                assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
                other = weights.fill(neurons, rng(1), rng(101))
                assert not all(torch.equal(a, b) for a, b in zip(values, other, strict=True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@every
def test_no_float_is_one_of_the_victims(planted: Net, weights: Weights) -> None:
    state = planted[0].float().state_dict()
    for site in planted[2]:
        neurons = ask(state, site, 9)
        for gap, value in zip(neurons.gaps, weights.fill(neurons, rng(), rng(100)), strict=True):
            made = gap.slot.role in (Role.INCOMING, Role.OUTGOING)
            if made or getattr(weights, "norm_source", None) != "default":
                assert not torch.isin(value, gap.victim).any(), gap.slot


@every
def test_variances_stay_positive_and_constant_vectors_constant(weights: Weights) -> None:
    tensors, site = layer()
    tensors |= {"bias": torch.zeros(30), "scale": torch.full((30,), 0.1)}
    values = filled(weights, tensors, site, 50)
    assert (values["variance"] > 0).all()
    assert (values["bias"] == 0).all()
    assert (values["scale"] == (1 if getattr(weights, "norm_source", None) == "default" else 0.1)).all()


@every
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
def test_sites_of_one_channel_or_of_one_value_make_no_nonsense(weights: Weights, value: float) -> None:
    for width in (1, 4):
        tensors, site = layer(width)
        tensors = {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}
        for made in filled(weights, tensors, site, 5).values():
            assert torch.isfinite(made).all() and made.abs().max() < 1e3
            assert not torch.signbit(made[made == 0]).any()
    single, site = layer(1)
    assert all(torch.isfinite(made).all() for made in filled(weights, single, site, 3).values())


@every
def test_each_encrypts_attention_and_streams_and_comes_off_again(weights: Weights) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu").eval()
    example = normal(2, 5, 8)
    sites = find_sites(block, example, streams=True)
    assert any(site.contracted for site in sites)
    defense = Defense(name="t", placement="proportional:proportion=0.5", weights=weights)
    encrypted, key = encrypt(block, example, defense, seed=3, sites=sites)
    assert torch.isfinite(encrypted(example)).all()
    state = block.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in decrypt(encrypted, key).state_dict().items())


@pytest.mark.parametrize("weights", [w for w in ALL if w.per_tensor], ids=repr)
def test_one_tensor_at_a_time_gives_the_same_kinds_of_values(planted: Net, weights: Weights) -> None:
    state = planted[0].float().state_dict()
    for site in planted[2]:
        whole = ask(state, site, 6)
        for number, gap in enumerate(whole.gaps):
            (value,) = weights.fill(Neurons(site, 6, (gap,)), rng(number), rng(99))
            assert value.shape == gap.shape and torch.isfinite(value).all()


def test_what_belongs_to_a_neuron_is_the_same_in_each_tensor() -> None:
    tensors, site = layer()
    apart = {}
    for number, gap in enumerate(ask(tensors, site, 12).gaps):
        (apart[gap.slot.tensor],) = Recombined(jitter=0).fill(Neurons(site, 12, (gap,)), rng(number), rng(7))
    near = [(apart[name][:, None] - tensors[name]).abs().argmin(1) for name in VECTORS]
    into = (apart["in"].flatten(1)[:, None] - tensors["in"].flatten(1)).abs().sum(2).argmin(1)
    assert all(torch.equal(source, into) for source in near)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Smoothed, "jitter", 0), (Smoothed, "form", "x"), (Kernels, "jitter", -0.1), (Matched, "jitter", 0),
        (Conditional, "share", 0), (Conditional, "share", 1.1), (Decoys, "strength", float("nan")),
        (Entangled, "group", 1), (Entangled, "remainder", float("inf")), (Recombined, "norm_source", "some"),
    ],
)  # fmt: skip
def test_parameters_beyond_sense_are_refused(kind: Any, field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=field):
        kind(**{field: value})


# smoothed


def test_smoothed_zeros_of_a_pruned_network_stay_as_frequent() -> None:
    tensors, site = layer()
    tensors["in"] = torch.where(normal(*tensors["in"].shape, seed=9) < 0, tensors["in"], 0)
    share = (tensors["in"] == 0).double().mean().item()
    for form in ("jitter", "density"):
        made = filled(Smoothed(form=form), tensors, site, 300)["in"]
        assert (made == 0).double().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("form", ["jitter", "density"])
def test_smoothed_values_have_the_tensors_distribution(form: Any) -> None:
    tensors, site = layer()
    made = filled(Smoothed(form=form), tensors, site, 200)
    for name in ("in", "out"):
        found = stats.ks_2samp(made[name].flatten().numpy(), tensors[name].flatten().numpy())
        assert found.statistic < 0.03


def test_between_interpolates_as_numpy_does() -> None:
    pool, uniform = normal(17), rng().random((3, 4))
    expected = np.quantile(pool.double().numpy(), uniform)
    assert np.allclose(between(pool, uniform).numpy(), expected, atol=1e-6)
    assert torch.equal(between(torch.ones(1), uniform), torch.ones(3, 4))


# kernels


def test_kernels_are_the_victims_whole_and_from_anywhere_in_the_tensor() -> None:
    tensors, site = layer()
    made = filled(Kernels(jitter=0), tensors, site, 20)
    for name in ("in", "out"):
        real = {tuple(k.flatten().tolist()) for k in tensors[name].flatten(0, 1)}
        drawn = [tuple(round_.tolist()) for round_ in made[name].flatten(0, 1).flatten(1)]
        # With jitter 0 a float still moves by one bit off the victim's.
        near = torch.tensor(drawn)[:, None] - torch.tensor(sorted(real))
        assert (near.abs().amax(2).amin(1) < 1e-6).all()
    partner = (made["in"].flatten(2)[:, 0, None] - tensors["in"].flatten(2)[:, 0]).abs().amax(2).amin(1)
    assert (partner > 1e-6).double().mean() > 0.6  # 7 of 8 come from another input


def test_kernels_of_one_number_are_kept_together_as_rows() -> None:
    tensors = {"in": normal(9, 6), "out": normal(5, 27, seed=1)}
    slots = (Slot("in", 0, Role.INCOMING), Slot("out", 1, Role.OUTGOING, block=3))
    made = filled(Kernels(jitter=0), tensors, Site("s", 9, slots), 9)
    distance = (made["in"][:, None] - tensors["in"]).abs().amax(2)
    assert sorted(distance.argmin(1).tolist()) == list(range(9)) and distance.amin(1).max() < 1e-6
    blocks, real = made["out"].reshape(5 * 9, 3), tensors["out"].reshape(5 * 9, 3)
    assert (blocks[:, None] - real).abs().amax(2).amin(1).max() < 1e-6


# neurons


def test_neurons_take_all_that_makes_them_from_one_channel_and_all_they_say_from_another() -> None:
    tensors, site = layer()
    made = filled(Recombined(jitter=0), tensors, site, 30)
    into = (made["in"].flatten(1)[:, None] - tensors["in"].flatten(1)).abs().amax(2)
    out = (made["out"].transpose(0, 1).flatten(1)[:, None] - tensors["out"].transpose(0, 1).flatten(1)).abs()
    out = out.amax(2)
    assert into.amin(1).max() < 1e-6 and out.amin(1).max() < 1e-6
    assert sorted(into.argmin(1).tolist()) == list(range(30))
    assert (into.argmin(1) != out.argmin(1)).all()
    for name in VECTORS:
        assert torch.allclose(made[name], tensors[name][into.argmin(1)])


# matched


def test_matched_rows_have_their_models_moments_and_norms() -> None:
    tensors, site = layer()
    made = filled(Matched(jitter=1e-6), tensors, site, 30)
    model = (made["bias"][:, None] - tensors["bias"]).abs().argmin(1)
    assert sorted(model.tolist()) == list(range(30))
    for name in ("in", "out"):
        rows, real = (t[name].transpose(0, int(name == "out")).flatten(1) for t in (made, tensors))
        assert torch.allclose(rows.mean(1), real.mean(1)[model], atol=1e-4)
        assert torch.allclose(rows.std(1), real.std(1)[model], rtol=1e-4)
        assert torch.allclose(rows.norm(dim=1), real.norm(dim=1)[model], rtol=1e-4)
        assert not torch.isclose(rows, real[model]).any(1).all()


def log_norms(tensors: dict[str, Tensor]) -> Tensor:
    into, out = tensors["in"].flatten(1).norm(dim=1), tensors["out"].transpose(0, 1).flatten(1).norm(dim=1)
    return torch.stack([into.log(), out.log(), tensors["scale"].log()])


def test_matched_norms_go_together_as_the_victims_do_and_samps_do_not() -> None:
    tensors, site = layer()
    real = np.corrcoef(log_norms(tensors).numpy())
    assert real.min() > 0.8
    assert np.corrcoef(log_norms(filled(Matched(), tensors, site, 300)).numpy()) == pytest.approx(
        real, abs=0.05
    )
    samp = np.corrcoef(log_norms(filled(Samp(norm_source="joint"), tensors, site, 300)).numpy())
    assert abs(samp[0, 1]) < 0.2


def test_matched_rows_are_as_peaked_as_real_ones_and_samps_are_not() -> None:
    tensors, site = layer()
    peaked = [
        float(np.median(stats.kurtosis(t["in"].flatten(1).numpy(), axis=1)))
        for t in (tensors, filled(Matched(), tensors, site, 200), filled(Samp(), tensors, site, 200))
    ]
    assert peaked[1] == pytest.approx(peaked[0], abs=0.4)
    assert peaked[2] > peaked[0] + 0.8


def test_moments_of_rows() -> None:
    rows = normal(4, 3, 5)
    mean, deviation = moments(rows)
    assert np.allclose(mean.flatten(), rows.flatten(1).numpy().mean(1), atol=1e-6)
    assert np.allclose(deviation.flatten(), rows.flatten(1).numpy().std(1), atol=1e-6)


# conditional


def test_conditional_kernels_are_real_ones_with_the_same_input_and_output() -> None:
    tensors, site = layer()
    made = filled(Conditional(jitter=0), tensors, site, 40)
    for name, dim in (("in", 0), ("out", 1)):
        rows, real = (t[name].transpose(0, dim).flatten(2) for t in (made, tensors))
        sources = (rows[:, None] - real).abs().amax(3)  # (made, real, partners)
        assert sources.amin(1).max() < 1e-6
        assert sources.argmin(1).double().std(1).min() > 0  # no row is one real channel's


def test_conditional_keeps_the_profile_over_inputs() -> None:
    tensors, site = layer()
    real = tensors["in"].square().mean((0, 2, 3)).sqrt()
    for weights, kept in ((Conditional(), True), (Conditional(form="gaussian"), True), (Kernels(), False)):
        made = filled(weights, tensors, site, 400)["in"].square().mean((0, 2, 3)).sqrt()
        assert (made.max() / made.min() > 5) == kept
        assert torch.allclose(made, real, rtol=0.15) == kept


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_gaussian_neurons_have_the_mean_and_variances_of_the_real_ones(share: float) -> None:
    tensors, site = layer(12, 3, 2, 1)
    made = filled(Conditional(form="gaussian", share=share), tensors, site, 20_000)
    for name in ("in", "bias", "shift", "mean", "scale", "out"):
        dim = int(name == "out")
        rows, real = (t[name].transpose(0, dim).reshape(t[name].shape[dim], -1) for t in (made, tensors))
        spread = real.std(0)
        assert ((rows.mean(0) - real.mean(0)).abs() / spread).max() < 0.03
        assert torch.allclose(rows.std(0), spread, rtol=0.03)


def test_gaussian_neurons_have_the_covariance_of_the_real_ones_across_slots() -> None:
    tensors, site = layer(12, 3, 2, 1)
    made = filled(Conditional(form="gaussian", share=1), tensors, site, 20_000)

    def joined(t: dict[str, Tensor]) -> Any:
        parts = [t["in"].flatten(1), t["scale"][:, None], t["out"].transpose(0, 1).flatten(1)]
        return np.corrcoef(torch.cat(parts, dim=1).double().numpy().T)

    assert joined(made) == pytest.approx(joined(tensors), abs=0.04)


def test_gaussian_neurons_lie_near_the_directions_of_the_real_ones() -> None:
    basis, site = normal(2, 54, seed=1), Site("s", 20, (Slot("in", 0, Role.INCOMING),))
    tensors = {"in": (normal(20, 2, seed=2) @ basis).view(20, 6, 3, 3)}
    rows = filled(Conditional(form="gaussian", share=0.99), tensors, site, 50)["in"].flatten(1)
    inside = rows @ torch.linalg.pinv(basis) @ basis
    assert (rows - inside).norm() / rows.norm() < 0.1


def test_directions_are_those_of_a_singular_value_decomposition() -> None:
    part = (normal(10, 40) * torch.linspace(3, 0.1, 10)[:, None]).double()
    part -= part.mean(0)
    u, s, _ = np.linalg.svd(part.numpy())
    enough = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.8)) + 1
    axes = directions([part], 0.8)
    assert axes.shape == (10, enough)
    assert np.abs(np.diag(axes.numpy().T @ u[:, :enough])) == pytest.approx(np.ones(enough))


# decoys


@pytest.mark.parametrize(("form", "strength"), [("negated", 1.0), ("negated", 2.5), ("noisy", 0.7)])
def test_decoys_are_real_neurons_that_say_something_else(form: Any, strength: float) -> None:
    tensors, site = layer()
    made = filled(Decoys(outgoing=form, strength=strength, jitter=0), tensors, site, 30)
    model = (made["in"].flatten(1)[:, None] - tensors["in"].flatten(1)).abs().sum(2).argmin(1)
    assert sorted(model.tolist()) == list(range(30))
    assert torch.allclose(made["in"], tensors["in"][model])
    for name in VECTORS:
        assert torch.allclose(made[name], tensors[name][model])
    out, real = (t["out"].transpose(0, 1).flatten(1) for t in (made, tensors))
    if form == "negated":
        assert torch.allclose(out, -strength * real[model])
    else:
        added = (out - real[model]).square().mean(1).sqrt() / real[model].square().mean(1).sqrt()
        assert added.numpy() == pytest.approx(np.full(30, strength), rel=0.35)
        assert added.mean().item() == pytest.approx(strength, rel=0.05)


# entangled


def outgoing(made: dict[str, Tensor]) -> Tensor:
    return made["out"].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("group", [2, 3])
def test_entangled_neurons_are_alike_within_groups_and_add_up_to_the_remainder(group: int) -> None:
    tensors, site = layer()
    weights = Entangled(group=group, strength=4, remainder=0.5, jitter=1e-6)
    made = filled(weights, tensors, site, 12)
    rows = made["in"].flatten(1)
    alike = (rows[:, None] - rows).abs().amax(2) < 1e-3
    assert (alike.sum(1) == group).all()
    for name in VECTORS:
        assert ((made[name][:, None] - made[name]).abs() < 1e-3)[alike].all()
    typical = outgoing(tensors).norm(dim=1).median()
    for members in alike:
        sizes = outgoing(made)[members].norm(dim=1) / typical
        assert sizes.square().mean().sqrt().item() == pytest.approx(4, rel=0.05)
        assert (outgoing(made)[members].sum(0).norm() / typical).item() == pytest.approx(0.5, rel=1e-2)


def test_entangled_neurons_without_a_partner_are_ordinary() -> None:
    tensors, site = layer()
    made = filled(Entangled(strength=50, remainder=1, jitter=1e-6), tensors, site, 1)
    assert outgoing(made).norm() / outgoing(tensors).norm(dim=1).median() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(7, 2, [2, 2, 3]), (3, 5, [3]), (1, 2, [1]), (6, 3, [3, 3])]
)
def test_groups_hold_as_many_as_asked_or_more(count: int, size: int, expected: list[int]) -> None:
    assert sorted(np.bincount(grouped(count, size, rng())).tolist()) == expected
    assert len({tuple(grouped(7, 2, rng(s))) for s in range(20)}) > 5


def test_a_whole_group_hardly_changes_a_network_and_part_of_one_does() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 5)).eval()
    inputs = normal(200, 10)
    defense = Defense(
        name="t",
        placement="proportional:proportion=0.1",
        weights=Entangled(remainder=0, jitter=1e-4, strength=5),
    )
    least = []
    for seed in range(10):
        encrypted, key = encrypt(net, inputs, defense, seed=seed)
        (chosen,) = key.positions.values()
        assert len(chosen) == 4

        def change(silent: tuple[int, ...], encrypted: Any = encrypted) -> float:
            changed = nn.Sequential(*encrypted)
            weight = changed[2].weight.detach().clone()
            weight[:, list(silent)] = 0
            with torch.no_grad():
                hidden = changed[:2](inputs)
                return float((hidden @ weight.T + changed[2].bias - net(inputs)).norm() / net(inputs).norm())

        assert change(()) < 0.01 and change(chosen) < 1e-5
        subsets = [chosen[:k] for k in (1, 3)] + [chosen[1:]] + [(c,) for c in chosen]
        least.append(min(change(subset) for subset in subsets))
    assert min(least) > 0.2 and np.median(least) > 0.4
