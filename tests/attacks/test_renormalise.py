"""BatchNorm behind folded convolutions: it changes nothing at first, lives in training, and goes again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.chain import fits
from attacks.finetune import Finetune
from attacks.renormalise import Renormalise
from deepenc.analysis.folding import fold
from deepenc.analysis.following import Run
from deepenc.analysis.renormalising import renormalised
from deepenc.network.sites import Role
from tests.attacks.fills import oversized

SMALL = {"steps": 4, "lr": 0.05}


def unnormalised(network, inputs):
    return Run.of(network, inputs).unnormalised()


def folded(planted):
    """The planted case after folding; nothing is charged for that."""
    case = planted.case
    network = copy.deepcopy(case.encrypted)
    for module in network.modules():
        module._forward_pre_hooks.clear()  # the meter's
        module._forward_hooks.clear()
    network = case.meter.watch(fold(network, case.example))
    norms = (Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE)
    sites = tuple(replace(s, slots=tuple(x for x in s.slots if x.role not in norms)) for s in case.sites)
    return replace(planted, case=replace(case, encrypted=network, sites=sites))


def norms_of(network):
    return [path for path, module in network.named_modules() if isinstance(module, _BatchNorm)]


@pytest.fixture
def network(plant):
    """A folded network in float64, and images."""
    case = folded(plant(oversized, unlabelled=128)).case
    return case.copy().double(), case.unlabelled.inputs.double()


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-11 * float(b.abs().max()))


@torch.no_grad()
def test_the_function_is_the_same_at_first_and_again_when_nothing_was_trained(network):
    model, images = network
    before, names = model(images), set(model.state_dict())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with renormalised(model, unnormalised(model, images), images[:40]) as norms:
        assert list(norms) == ["conv1", "conv2"] and len(norms_of(model)) == 2
        assert close(model(images), before)
    assert set(model.state_dict()) == names and not norms_of(model)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert close(model(images), before)


@torch.no_grad()
def test_batch_statistics_are_live_inside(network):
    """Normalised by the very images they were measured on, outputs are the same; by others they are not."""
    model, images = network
    expected = model(images)
    with renormalised(model, unnormalised(model, images), images[:64]):
        same, other = model.train()(images[:64]), model.train()(images[64:])
        model.eval()
    assert close(same, expected[:64])
    assert not torch.allclose(other, expected[64:], rtol=0, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def test_convolutions_are_divided_by_the_deviation_of_their_outputs(network):
    model, images = network
    expected = model.conv1(images).std((0, 2, 3), correction=0)
    with renormalised(model, unnormalised(model, images), images) as norms:
        made = {}
        hooks = [
            norm.register_forward_pre_hook(lambda _, given, path=path: made.update({path: given[0]}))
            for path, norm in norms.items()
        ]
        model(images)
        for hook in hooks:
            hook.remove()
        for path, values in made.items():
            assert torch.allclose(values.std((0, 2, 3), correction=0), torch.ones(()).double()), path
        assert torch.allclose(norms["conv1"].weight, expected, rtol=1e-4)


@torch.no_grad()
def test_what_was_learned_stays_when_the_norms_go(network):
    model, images = network
    with renormalised(model, unnormalised(model, images), images) as norms:
        for norm in norms.values():
            norm.weight.mul_(1.7)
            norm.bias.sub_(0.3)
            norm.running_var.mul_(0.4)
            norm.running_mean.add_(0.2)
        expected = model(images)
    assert close(model(images), expected)


@torch.no_grad()
def test_outputs_that_grow_are_scaled_down_before_the_layers_behind_are_measured(network):
    model, images = network
    deviations = model.conv1(images).std((0, 2, 3), correction=0)
    limit = 2 * deviations.median()  # torch's: the lower one of the two in the middle
    model.conv2.weight.mul_(1e6)
    first, second = model.conv1, model.conv2
    down = torch.where(deviations > limit, limit / deviations, 1.0)[:, None, None]
    maps = second(torch.relu(down * first(images)))
    expected = maps * (limit / maps.std((0, 2, 3), correction=0)).clamp(max=1)[:, None, None]
    assert float(down.min()) < 1 and bool((maps.std((0, 2, 3)) > limit).any())
    seen = []
    with renormalised(model, unnormalised(model, images), images, largest=2.0) as norms:
        hook = norms["conv2"].register_forward_hook(lambda *given: seen.append(given[2]))
        model(images)
        hook.remove()
    assert close(seen[0], expected)


@torch.no_grad()
def test_channels_that_are_constant_stay_so(network):
    model, images = network
    model.conv1.weight[2] = 0
    before = model(images)
    with renormalised(model, unnormalised(model, images), images) as norms:
        assert close(model(images), before)
        assert torch.isfinite(norms["conv1"].weight).all()
    assert close(model(images), before) and not model.conv1.weight[2].any()


@torch.no_grad()
def test_only_convolutions_without_a_norm_get_one(plant):
    case = plant(unlabelled=16).case
    assert unnormalised(case.copy(), case.unlabelled.inputs) == ["conv2"]
    network = case.copy()
    network.bn1 = nn.Identity()
    assert unnormalised(network, case.unlabelled.inputs) == ["conv1", "conv2"]
    network.conv2.bias[3] = torch.inf
    with renormalised(network, ["conv1", "conv2"], case.unlabelled.inputs) as norms:
        assert list(norms) == ["conv1"]


def test_where_all_have_a_norm_it_is_finetune(plant):
    case = plant(labelled=40).case
    case.encrypted.conv2 = nn.Sequential(case.encrypted.conv2, nn.BatchNorm2d(14)).eval()
    again = plant(labelled=40).case.with_network(copy.deepcopy(case.encrypted))
    own, other = (
        attack.attack(c).network.state_dict()
        for attack, c in ((Renormalise(**SMALL), case), (Finetune(**SMALL), again))
    )
    assert own.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in own.items())


def test_damage_is_repaired_and_more_steps_repair_more(plant):
    planted = folded(plant(oversized, labelled=200, unlabelled=64))
    assert planted.accuracy(planted.case.encrypted) < 0.7
    few, many = (
        planted.accuracy(Renormalise(steps=n, lr=0.05).attack(planted.case).network) for n in (1, 60)
    )
    assert few < many > 0.9


def test_a_clean_network_is_not_lost(plant):
    clean = folded(plant(positions={}, labelled=200))
    assert clean.accuracy(Renormalise(steps=20).attack(clean.case).network) > 0.95


def test_the_claim_has_the_encrypted_networks_structure(plant):
    planted = folded(plant(labelled=40, unlabelled=20))
    case, before = planted.case, {n: t.clone() for n, t in planted.case.encrypted.state_dict().items()}
    network = Renormalise(**SMALL).attack(case).network
    assert fits(network, case.encrypted, case.sites) and network.state_dict().keys() == before.keys()
    assert not network.training and not norms_of(network)
    assert all(torch.equal(t, before[n]) for n, t in case.encrypted.state_dict().items())
    removed = case.with_network(network).remove(planted.positions)
    assert removed.conv1.out_channels == 12


def test_unlabelled_images_come_first_and_all_are_counted(plant, monkeypatch):
    seen = []

    def spying(network, paths, inputs, largest):
        seen.append(inputs)
        return renormalised(network, paths, inputs, largest)

    monkeypatch.setattr("attacks.renormalise.renormalised", spying)
    case = folded(plant(labelled=20, unlabelled=10)).case
    with case.meter.running():
        Renormalise(images=25, **SMALL).attack(case)
    assert torch.equal(seen[0], torch.cat([case.unlabelled.inputs, case.labelled.inputs[:15]]))
    assert (case.meter.samples, case.meter.steps) == (1 + 25 + 4 * 20, 4)


@pytest.mark.parametrize(
    ("budget", "spent"),
    [({"steps": 3}, (3, 1 + 64 + 96)), ({"samples": 120}, (1, 60 + 32)), ({"samples": 40}, (0, 20))],
)
def test_it_keeps_to_its_budget(plant, budget, spent):
    case = folded(plant(labelled=32, unlabelled=64, **budget)).case
    with case.meter.running():
        claim = Renormalise().attack(case)
    assert (case.meter.steps, case.meter.samples) == spent
    assert not norms_of(claim.network)


@pytest.mark.parametrize("budget", [{"steps": 0}, {"samples": 0}, {"samples": 31}])
def test_without_budget_for_a_step_nothing_is_spent(plant, budget):
    case = folded(plant(labelled=32, unlabelled=64, **budget)).case
    own = case.encrypted.state_dict()
    claimed = Renormalise().attack(case).network.state_dict()
    assert case.meter.samples == 0 and all(torch.equal(t, own[n]) for n, t in claimed.items())


def test_divergence_is_told_and_weights_stay_finite(plant):
    case = folded(plant(labelled=40)).case
    claim = Renormalise(steps=30, lr=1e30).attack(case)
    assert claim.diverged and all(torch.isfinite(t).all() for t in claim.network.state_dict().values())


def test_equal_seeds_equal_claims_and_global_generators_stay(plant):
    claims = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        claims.append(Renormalise(**SMALL).attack(folded(plant(labelled=40)).case).network.state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, claims[1][n]) for n, t in claims[0].items())
