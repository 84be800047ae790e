"""Detectors that read the feature table: planted noise, clones, defaults are found, and else nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from attacks.alignment import Alignment
from attacks.batchnorm_defaults import BatchNormDefaults, nearness
from attacks.coupling import Coupling
from attacks.distribution import Distribution
from attacks.mixture import Mixture
from attacks.outliers import Outliers
from attacks.profile import Profile
from attacks.roughness import Roughness
from attacks.subspace import Subspace
from attacks.typical import Typical
from deepenc.arena.checks.selftest import selftest
from deepenc.arena.metrics import checked_scores
from deepenc.errors import ClaimError
from deepenc.network.sites import Role

BOTH = {"conv1": 1.0, "conv2": 1.0}
SIDES = (Role.INCOMING, Role.OUTGOING)
DISTANCES = ("ks", "ad", "energy", "moments")
METHODS = ("covariance", "isolation-forest", "lof", "svm")
ALL = (
    Alignment(),
    Alignment(look_for="clone"),
    Alignment(look_for="both"),
    BatchNormDefaults(),
    Coupling(),
    *(Distribution(statistic=s, sign=sign) for s in DISTANCES for sign in ("typical", "outlier")),
    Mixture(),
    *(Outliers(method=method) for method in METHODS),
    Profile(),
    Roughness(),
    Subspace(),
    Typical(),
)
label = str


def noise(slot, shape, victim, generator):
    """Weights one by one, of the tensor's scale; all else copied from real channels."""
    if slot.role in SIDES:
        return float(victim.square().mean().sqrt()) * torch.randn(shape, generator=generator)
    return like_a_real_channel(slot, shape, victim, generator)


def like_a_real_channel(slot, shape, victim, generator):
    """Entries of real channels, the first ones; once more where another site widened the tensor."""
    for dim, size in enumerate(shape):
        victim = torch.cat([victim] * (1 + size // victim.shape[dim]), dim).narrow(dim, 0, size)
    return victim.clone()


@pytest.fixture(scope="module")
def structured(trained):
    """A network of width 40 with what training gives: smooth kernels, low rank, a scale for each channel."""
    generator = torch.Generator().manual_seed(8)
    network = type(trained)(40).eval()

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    smooth = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    scales = (0.5 * normal(40)).exp(), (0.5 * normal(40)).exp()
    with torch.no_grad():
        network.conv1.weight.copy_((3 + normal(40, 1, 1, 1)) * smooth * (1 + 0.1 * normal(40, 1, 3, 3)))
        network.bn1.weight.copy_(scales[0] * (1 + 0.05 * normal(40)))
        network.bn1.bias.copy_(normal(40))
        network.bn1.running_mean.copy_(normal(40))
        network.bn1.running_var.copy_(
            network.conv1.weight.square().sum((1, 2, 3)) * (1 + 0.05 * normal(40)).abs()
        )
        low = (normal(40, 3) @ normal(3, 40))[:, :, None, None]
        network.conv2.weight.copy_(low * smooth * scales[0][:, None, None] * (1 + 0.1 * normal(40, 40, 3, 3)))
        network.conv2.bias.copy_(normal(40))
        readout = (normal(4, 3) @ normal(3, 40)) * scales[1]
        network.linear.weight.copy_((readout[:, :, None] * (1 + 0.1 * normal(4, 40, 4))).flatten(1))
    return network


@pytest.fixture
def noisy(plant, structured):
    def make(fill=noise, positions=None, **more):
        positions = positions or {"conv1": (3, 17, 41), "conv2": (0, 25)}
        return plant(fill, network=structured, width=40, positions=positions, **more)

    return make


@pytest.mark.parametrize("attack", [Roughness(), Subspace(), Mixture()], ids=label)
def test_noise_is_found_exactly(noisy, attack):
    planted = noisy()
    assert planted.auc(attack.attack(planted.case).scores) == BOTH


@pytest.mark.parametrize("attack", [Profile(), Alignment()], ids=label)
def test_noise_is_found(noisy, attack):
    # The 9 weights of conv1's kernels from one input have no profile and little direction.
    planted = noisy()
    assert planted.auc(attack.attack(planted.case).scores)["conv2"] == 1


@pytest.mark.parametrize("site", ["conv1", "conv2"])
def test_real_channels_once_more_are_no_noise(noisy, site):
    planted = noisy(like_a_real_channel, {site: tuple(range(0, 60, 3))})
    for attack in (Roughness(), Profile(), Subspace(), Alignment()):
        assert planted.auc(attack.attack(planted.case).scores)[site] < 0.7


@pytest.mark.parametrize(
    "attack",
    [attack for attack in ALL if attack.detects],
    ids=lambda attack: f"{attack.name} {attack.detects}",
)
def test_promises_are_kept(attack):
    assert selftest(attack) is None


def test_what_is_promised_goes_with_the_parameters():
    assert Alignment().detects == "noise" and Alignment(look_for="clone").detects is None
    assert Distribution().detects is None and Distribution(sign="outlier").detects == "loud"
    assert [Outliers(method=method).detects for method in METHODS] == ["loud", None, "loud", None]


@pytest.mark.parametrize("attack", ALL, ids=label)
def test_at_chance_where_all_channels_are_alike(plant, random_network, attack):
    positions = {"conv1": tuple(range(0, 200, 4)), "conv2": tuple(range(1, 190, 5))}
    planted = plant(network=random_network(150), width=150, positions=positions)
    # Two sites of 50 and 38 among 190 and more: the deviation of an AUC is below 0.05.
    for auc in planted.auc(attack.attack(planted.case).scores).values():
        assert 0.32 < auc < 0.68


def of_the_layer(slot, shape, victim, generator):
    drawn = torch.randint(victim.numel(), shape, generator=generator)
    return victim.flatten()[drawn]


@pytest.mark.parametrize("statistic", DISTANCES[:3])
def test_draws_from_the_layer_are_too_typical_and_others_too_far(plant, random_network, statistic):
    network = random_network(60)
    generator = torch.Generator().manual_seed(1)
    for tensor in (network.conv1.weight, network.conv2.weight):  # every channel has a scale and a centre
        scale, centre = (torch.rand(60, 1, 1, 1, generator=generator) for _ in range(2))
        tensor.data.copy_((tensor + 0.2 * centre) * (0.2 + scale))
    scale = torch.rand(60, 1, generator=generator).expand(60, 4).reshape(-1) + 0.2
    network.linear.weight.data.mul_(scale)
    positions = {"conv2": (4, 19, 33, 50)}
    planted = plant(of_the_layer, network=network, width=60, positions=positions)
    typical = Distribution(statistic=statistic).attack(planted.case).scores
    assert planted.auc(typical)["conv2"] > 0.85

    def loud(slot, shape, victim, generator):
        return 20 * victim.std() * torch.ones(shape)

    planted = plant(loud, network=network, width=60, positions=positions)
    far = Distribution(statistic=statistic, sign="outlier").attack(planted.case).scores
    assert planted.auc(far)["conv2"] == 1


def test_moments_by_their_z_scores(noisy):
    planted = noisy()
    scores = Distribution(statistic="moments", sign="outlier").attack(planted.case).scores["conv2"]
    weights = planted.case.encrypted.state_dict()
    total = 0
    for part in (weights["conv2.weight"].flatten(1), weights["linear.weight"].view(4, 42, 4).transpose(0, 1)):
        values = part.reshape(42, -1).double().numpy()
        skew, kurtosis = stats.skew(values, axis=1), stats.kurtosis(values, axis=1)
        for moment in (values.mean(1), values.std(1), skew, kurtosis):
            away = moment - np.median(moment)
            total += abs(away) / (1.4826 * np.median(abs(away)))
    assert scores.tolist() == pytest.approx(total, rel=1e-3)


def test_typical_is_the_mirror_of_norms(plant, random_network):
    network = random_network(20)
    network.conv2.weight.data.mul_(torch.rand(20, 1, 1, 1, generator=torch.Generator().manual_seed(1)) + 0.2)
    planted = plant(_middle(network), network=network, width=20, positions={"conv2": (2, 9)})
    assert planted.auc(Typical().attack(planted.case).scores)["conv2"] == 1


def _middle(network):
    """Weights whose norms are the medians of the network's."""

    def fill(slot, shape, victim, generator):
        if slot.role not in SIDES:
            return torch.zeros(shape)
        rows = victim.movedim(slot.dim, 0).reshape(20, -1)
        per_entry = rows.norm(dim=1).median() / rows.shape[1] ** 0.5
        return per_entry * torch.ones(shape)

    return fill


@pytest.mark.parametrize("jitter", [0.0, 1e-5])
def test_defaults_are_found_exact_and_near(noisy, jitter):
    centres = {Role.SCALE: 1.0, Role.VARIANCE: 1.0}

    def defaults(slot, shape, victim, generator):
        if slot.role in SIDES:
            return noise(slot, shape, victim, generator)
        return centres.get(slot.role, 0.0) + jitter * torch.randn(shape, generator=generator)

    planted = noisy(defaults)
    scores = BatchNormDefaults().attack(planted.case).scores
    assert planted.auc(scores) == BOTH
    assert scores["conv1"][3] > 0.9 and scores["conv2"][0] > 0.9  # four vectors, and a bias alone


def test_nearness_by_hand():
    # Distances from 1: 0, 0.01, 2, 2: the median of those above 0 is 2, a hundredth of it 0.02.
    rows = torch.tensor([[1.0], [1.01], [3.0], [-1.0]], dtype=torch.float64)
    assert nearness(rows, 1.0, 0.01).tolist() == pytest.approx([1, 2 / 3, 0.02 / 2.02, 0.02 / 2.02])
    assert nearness(torch.ones(3, 2).double(), 1.0, 0.01).tolist() == [1, 1, 1]


def test_clones_are_too_much_alike(plant, random_network):
    def clone(slot, shape, victim, generator):
        if slot.role is Role.INCOMING:  # of real channel 3, in a tensor that only this site widens
            return victim[3:4] * (1 + 0.01 * torch.randn(shape, generator=generator))
        return victim.mean() + victim.std() * torch.randn(shape, generator=generator)

    planted = plant(clone, network=random_network(30), width=30, positions={"conv2": (0,)})
    scores = Alignment(look_for="clone").attack(planted.case).scores["conv2"]
    assert scores.topk(2).indices.sort().values.tolist() == [0, 4]  # the clone and its original
    either = Alignment(look_for="both").attack(planted.case).scores["conv2"]
    assert either.topk(2).indices.sort().values.tolist() == [0, 4]


@pytest.mark.parametrize("role", [Role.OUTGOING, Role.VARIANCE])
def test_coupling_sees_parts_that_do_not_belong_together(noisy, role):
    def uncoupled(slot, shape, victim, generator):
        like = like_a_real_channel(slot, shape, victim, generator)
        return like * 30 if slot.role is role else like

    planted = noisy(uncoupled)
    assert planted.auc(Coupling().attack(planted.case).scores)["conv1"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_outliers_sees_loud_noise(noisy, method):
    def loud(slot, shape, victim, generator):
        return 20 * noise(slot, shape, victim, generator)

    planted = noisy(loud)
    assert min(planted.auc(Outliers(method=method).attack(planted.case).scores).values()) > 0.9


def test_mixture_needs_the_configuration(noisy):
    assert Mixture().needs.allocation
    with pytest.raises(ClaimError, match="allocation: true"):
        Mixture().attack(noisy(allocation=False).case)


@pytest.mark.parametrize("attack", [a for a in ALL if a != BatchNormDefaults()], ids=label)
def test_dead_channels_are_not_suspected(noisy, structured, attack):
    planted = noisy()
    state = planted.case.encrypted.state_dict()
    state["conv2.weight"][30] *= 0.01
    state["linear.weight"][:, 120:124] *= 0.01
    scores = attack.attack(planted.case).scores["conv2"]
    assert (scores >= scores[30]).sum() >= 10


@pytest.mark.parametrize("attack", ALL, ids=label)
def test_equal_weights_say_nothing(plant, trained, attack):
    network = _constant(trained)
    planted = plant(lambda slot, shape, victim, generator: torch.full(shape, 0.5), network=network)
    scores = checked_scores(attack.attack(planted.case).scores, planted.case.sites, "test")
    assert all((values == values[0]).all() for values in scores.values())


def _constant(trained: nn.Module) -> nn.Module:
    network = copy.deepcopy(trained)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(0.5)
    return network.eval()


@pytest.mark.parametrize("attack", ALL, ids=label)
def test_the_case_stays_as_it_was_and_seeds_decide(noisy, attack):
    planted = noisy()
    before = {name: t.clone() for name, t in planted.case.encrypted.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = (attack.attack(planted.case) for _ in range(2))
    assert first.network is None
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)
    assert all(torch.equal(t, before[n]) for n, t in planted.case.encrypted.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert planted.case.meter.samples == 0


@pytest.mark.parametrize("attack", ALL, ids=label)
def test_without_confusion_channels_or_with_few_channels(plant, random_network, attack):
    planted = plant(network=random_network(3), width=3, positions={})
    checked_scores(attack.attack(planted.case).scores, planted.case.sites, "test")
