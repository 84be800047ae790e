from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.analysis.batchnorm import batch_moments, batch_statistics
from deepenc.analysis.features import features
from deepenc.encryption.filling.entries import Confusion, confusion_mask, limits
from deepenc.encryption.filling.stealth import Disguise, _statistics, _table, penalty
from deepenc.network.gates import Gated
from deepenc.network.sites import Role, Site
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, replace_widened, widen, widened

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
FORGED = {"0": (0, 7, 21), "3": (5, 6, 40, 41)}


@pytest.fixture
def crowd(planted: Net) -> tuple[nn.Module, Layout, Tensor]:
    """The planted network with random weights, its confusion entries drawn, too."""
    net, _, sites = planted
    layout = Layout(sites, FORGED)
    generator = torch.Generator().manual_seed(3)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4 + (tensor.ndim == 1))
    tensors = widened(net.state_dict(), layout)
    for name, tensor in tensors.items():
        noise = torch.rand(tensor.shape, generator=generator) + 0.5
        tensors[name] = torch.where(confusion_mask(layout, name, tensor.shape), noise, tensor)
    inputs = torch.randn(6, 3, 4, 4, generator=generator)
    net[1].running_var.clamp_(0.5)
    return replace_widened(net, tensors, layout).eval(), layout, inputs


def test_the_mask_is_what_inserting_leaves_empty(planted: Net) -> None:
    net, _, sites = planted
    layout = Layout(sites, FORGED)
    for name, tensor in net.state_dict().items():
        if name in set(layout.changed()):
            shape = layout.widened_shape(name, tensor.shape)
            empty = widen(torch.ones_like(tensor), layout.kept(name, tensor.shape), shape) == 0
            assert torch.equal(confusion_mask(layout, name, shape), empty)
            assert 0 < empty.sum() < empty.numel()


def test_gradients_are_those_of_the_whole_network_at_the_confusion_entries(
    crowd: tuple[nn.Module, Layout, Tensor],
) -> None:
    network, layout, inputs = crowd
    confusion = Confusion(network, layout)
    assert torch.equal(confusion(inputs), network(inputs))
    assert set(confusion.values) == {
        "0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "6.weight",
    }  # fmt: skip
    ours = torch.autograd.grad(confusion(inputs).square().sum(), list(confusion.values.values()))
    network(inputs).square().sum().backward()
    for (name, gradient), parameter in zip(
        zip(confusion.values, ours, strict=True),
        (dict(network.named_parameters())[name] for name in confusion.values),
        strict=True,
    ):
        mask = confusion_mask(layout, name, parameter.shape)
        assert torch.allclose(gradient, parameter.grad[mask], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_storing_changes_confusion_entries_only(
    crowd: tuple[nn.Module, Layout, Tensor], dtype: torch.dtype
) -> None:
    network, layout = crowd[0].to(dtype), crowd[1]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    confusion = Confusion(network, layout)
    with torch.no_grad():
        for value in confusion.values.values():
            assert value.dtype == torch.promote_types(dtype, torch.float32) and value.is_leaf
            value.fill_(-77)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    confusion.store()
    for name, tensor in network.state_dict().items():
        wanted = before[name].clone()
        if name in confusion.values:
            wanted[confusion_mask(layout, name, wanted.shape)] = -77
        assert torch.equal(tensor, wanted), name


def test_gates_multiply_as_elsewhere(crowd: tuple[nn.Module, Layout, Tensor]) -> None:
    network, layout, inputs = crowd
    gates = {site.name: torch.rand(site.width) for site in layout.widened_sites()}
    gated = Gated(network, layout.widened_sites())
    gated.gates = gates
    assert torch.allclose(Confusion(network, layout)(inputs, gates=gates), gated(inputs))


def test_limits_are_quantiles_of_norms_and_the_range_of_vectors(planted: Net) -> None:
    net, _, sites = planted
    state = net.state_dict()
    for quantile in (0.5, 0.9, 1.0):
        found = limits(state, sites, quantile)
        weight, gamma = state["3.weight"].numpy(), state["1.weight"].numpy()
        for (name, slot), (least, largest) in found.items():
            if slot.tensor == "3.weight":
                rows = weight.reshape(40, -1) if name == "3" else weight.swapaxes(0, 1).reshape(20, -1)
                norms = np.linalg.norm(rows.astype(float), axis=1)
                assert (float(least), float(largest)) == pytest.approx((0, np.quantile(norms, quantile)))
            if slot.tensor == "1.weight":
                ends = np.quantile(gamma, (1 - quantile, quantile))
                assert (float(least), float(largest)) == pytest.approx(ends)


def test_the_cap_shrinks_what_is_too_large_and_nothing_else(
    crowd: tuple[nn.Module, Layout, Tensor],
) -> None:
    network, layout, _ = crowd
    victim_like = {name: tensor / 100 for name, tensor in network.state_dict().items()}
    tight, wide = (limits(t, layout.widened_sites(), 1.0) for t in (victim_like, network.state_dict()))
    by_victim = {
        (site.name, slot): (tight if site.name == "0" else wide)[site.name, layout.widened_slot(slot)]
        for site in layout.sites
        for slot in site.slots
    }
    confusion = Confusion(network, layout)
    before = {name: value.detach().clone() for name, value in confusion.tensors().items()}
    confusion.cap(by_victim)
    after = confusion.tensors()
    for victim, site in zip(layout.sites, layout.widened_sites(), strict=True):
        inserted = list(layout.positions[site.name])
        for slot, moved in zip(victim.slots, site.slots, strict=True):
            if slot.tensor in after:
                least, largest = by_victim[site.name, slot]
                rows = moved.rows(after[slot.tensor].detach(), site.width)[inserted].double()
                sizes = rows if after[slot.tensor].ndim == 1 else rows.norm(dim=1)
                assert sizes.min() >= least - 1e-6 and sizes.max() <= largest * (1 + 1e-5)
    # What only the second site owns was within its own network's limits.
    for name in ("3.bias", "6.weight"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    mask = confusion_mask(layout, "0.weight", after["0.weight"].shape)
    assert torch.equal(after["0.weight"][~mask], before["0.weight"][~mask])
    # Rows are shrunk, not turned.
    row = layout.positions["0"][0]
    cosine = torch.cosine_similarity(after["0.weight"][row].flatten(), before["0.weight"][row].flatten(), 0)
    assert cosine.item() == pytest.approx(1, abs=1e-5)


def test_batch_statistics_are_those_of_training_and_leave_nothing(
    crowd: tuple[nn.Module, Layout, Tensor],
) -> None:
    network, _, inputs = crowd
    norm = network[1]
    norm.momentum = 0.3
    before = {name: tensor.clone() for name, tensor in named_tensors(network).items()}
    with pytest.raises(KeyError), batch_statistics(network):
        live = network(inputs)
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(network).items())
    assert (norm.training, norm.track_running_stats, norm.momentum) == (False, True, 0.3)
    assert not torch.allclose(network(inputs), live)
    assert torch.equal(network.train()(inputs), live)
    assert norm.num_batches_tracked == before["1.num_batches_tracked"] + 1


def redrawn(network: nn.Module, layout: Layout, scale: float) -> dict[str, Tensor]:
    """The network's tensors, confusion entries drawn as the real ones were, then multiplied."""
    generator = torch.Generator().manual_seed(8)
    tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}
    for name in layout.changed():
        drawn = torch.randn(tensors[name].shape, generator=generator) / 4 + (tensors[name].ndim == 1)
        mask = confusion_mask(layout, name, drawn.shape)
        tensors[name][mask] = scale * drawn[mask]
    return tensors


def test_the_penalty_sees_what_stands_out(crowd: tuple[nn.Module, Layout, Tensor]) -> None:
    network, layout, _ = crowd
    alike, louder, loud = (penalty(redrawn(network, layout, scale), layout) for scale in (1.0, 3.0, 30.0))
    assert 0 < alike < 0.5
    assert loud > 2 * louder > 8 * alike


def alone(site: Site, role: Role) -> Site:
    """The site with its slots of one role."""
    return Site(site.name, site.width, tuple(slot for slot in site.slots if slot.role is role))


def test_norm_and_roughness_by_hand(crowd: tuple[nn.Module, Layout, Tensor]) -> None:
    network, layout, _ = crowd
    tensors = {"0.weight": network.state_dict()["0.weight"]}
    site = alone(layout.widened_sites()[0], Role.INCOMING)
    found = [one.values.numpy() for one in _statistics(tensors, site)]
    for channel, kernels in enumerate(tensors["0.weight"].double().numpy()):
        energy = (kernels**2).sum()
        products = (kernels[:, 1:] * kernels[:, :-1]).sum() + (kernels[:, :, 1:] * kernels[:, :, :-1]).sum()
        assert found[0][channel] == pytest.approx(np.log(energy) / 2, abs=1e-4)
        assert found[1][channel] == pytest.approx(kernels.mean(), abs=1e-5)
        assert found[-1][channel] == pytest.approx(-products / energy, abs=1e-4)


@pytest.mark.parametrize(("role", "side"), [(Role.INCOMING, "in"), (Role.OUTGOING, "out")])
def test_a_defense_hides_from_the_very_statistics_that_the_attacks_measure(
    crowd: tuple[nn.Module, Layout, Tensor], role: Role, side: str
) -> None:
    network, layout, _ = crowd
    site = alone(layout.widened_sites()[0], role)
    tensors = {slot.tensor: network.state_dict()[slot.tensor] for slot in site.slots}
    names = ["norm", "mean", "deviation", "skew", "kurtosis", "roughness", "profile", "subspace", "cosine"]
    table = features(tensors, [site], [f"{name}_{side}" for name in names])[site.name]
    assert len(table.names) == len(names)
    scale = next(iter(tensors.values())).square().mean().sqrt()  # the table has its slot's as its unit
    units = {f"{name}_{side}": scale for name in ("mean", "deviation")}
    ours = _table(tensors, site)
    for name, values in zip(table.names, table.values.T, strict=True):
        off = (ours - (values * units.get(name, 1.0))[:, None]).abs().amax(0)
        assert sum(off < 1e-4) == 1, name


def test_looks_are_distributed_as_those_of_real_channels(planted: Net) -> None:
    """Among real channels a large norm goes with a large factor; among those in disguise, too."""
    net, _, sites = planted
    generator = torch.Generator().manual_seed(0)
    state = net.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) + 3 * (tensor.ndim == 1))
    sizes = torch.rand(len(state["0.weight"]), generator=generator) + 0.5
    state["0.weight"] *= sizes.view(-1, 1, 1, 1) / state["0.weight"].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    state["1.weight"].copy_(2 * sizes)
    layout = Layout(sites, {"0": tuple(range(20, 320)), "3": ()})
    tensors = widened(state, layout)
    network = replace_widened(net, tensors, layout).eval()
    disguise = Disguise(named_tensors(network), layout, np.random.default_rng(0))
    found = {
        slot.tensor: each for (_, slot), (each, _) in disguise.target_norms(named_tensors(network)).items()
    }
    norms, factors = found["0.weight"].numpy(), found["1.weight"].numpy()
    assert norms.min() >= sizes.min() - 1e-5 and norms.max() <= sizes.max() + 1e-5
    assert np.quantile(norms, (0.25, 0.5, 0.75)) == pytest.approx(
        sizes.quantile(torch.tensor([0.25, 0.5, 0.75])), abs=0.1
    )
    assert np.corrcoef(norms, factors)[0, 1] > 0.9
    assert len(np.unique(norms)) > 250, "none copies a real one"

    confusion = Confusion(network, layout)
    with torch.no_grad():
        for value in confusion.values.values():
            value.normal_(0, 5)
    confusion.cap(disguise.target_norms(named_tensors(network)))
    rows = confusion.tensors()["0.weight"][20:].flatten(1).norm(dim=1)
    assert torch.allclose(rows.double(), found["0.weight"].double(), rtol=1e-4)


def test_a_disguise_is_put_on(crowd: tuple[nn.Module, Layout, Tensor]) -> None:
    network, layout, inputs = crowd
    with batch_moments(network) as seen, torch.no_grad():
        network(inputs)
    assert torch.allclose(seen["1.running_mean"], network[0](inputs).mean((0, 2, 3)), atol=1e-5)
    tensors = named_tensors(network) | seen
    disguise = Disguise(tensors, layout, np.random.default_rng(0))
    confusion = Confusion(network, layout)
    adam = torch.optim.Adam(confusion.values.values(), lr=0.03)
    before = disguise.penalty(confusion.tensors() | seen).item()
    for _ in range(60):
        adam.zero_grad()
        disguise.penalty(confusion.tensors() | seen).backward()
        adam.step()
    assert disguise.penalty(confusion.tensors() | seen).item() < before / 3


def test_a_network_like_all_others_is_finite_under_the_penalty(
    crowd: tuple[nn.Module, Layout, Tensor],
) -> None:
    network, layout, _ = crowd
    flat = {name: torch.full_like(t.detach(), 0.5) for name, t in named_tensors(network).items()}
    leaves = {name: t.requires_grad_() for name, t in flat.items() if t.is_floating_point()}
    value = penalty(flat, layout)
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    assert value.isfinite() and all(g is None or g.isfinite().all() for g in gradients)
