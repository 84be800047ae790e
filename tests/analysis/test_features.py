"""The feature table: each statistic beside scipy's or a plain loop's, and networks of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from deepenc.analysis.features import (
    CHANNELS,
    NAMES,
    SIDES,
    SiteChannels,
    features,
    parts,
    robust,
    standardised,
)
from deepenc.analysis.features.ranks import decode, distances, encode
from deepenc.errors import ConfigError, SiteError
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import named_tensors
from tests.analysis.plain_features import Plain

WIDTH = 9


def site(*slots, width=WIDTH, name="site"):
    return Site(name, width, slots)


SITE = site(
    Slot("conv", 0, Role.INCOMING),
    Slot("conv_bias", 0, Role.BIAS),
    *(
        Slot(name, 0, role)
        for name, role in (
            ("gamma", Role.SCALE),
            ("beta", Role.SHIFT),
            ("mean", Role.MEAN),
            ("var", Role.VARIANCE),
        )
    ),
    Slot("next", 1, Role.OUTGOING, start=2),
    Slot("linear", 1, Role.OUTGOING, block=4),
)


def tensors():
    """Weights with structure: smooth kernels, inputs of unequal scale, entries of other sites beside them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "conv": (normal(WIDTH, 6, 3, 3) + normal(1, 6, 1, 1)) * normal(1, 6, 1, 1) * normal(WIDTH, 1, 1, 1),
        "conv_bias": normal(WIDTH),
        "gamma": normal(WIDTH),
        "beta": normal(WIDTH),
        "mean": normal(WIDTH),
        "var": normal(WIDTH).exp(),
        "next": 0.1 * normal(5, WIDTH + 4, 1, 3),
        "linear": 30 * normal(7, WIDTH * 4),
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_statistic_is_the_loops(name):
    table = features(tensors(), [SITE])["site"]
    loop = Plain(tensors(), SITE)
    expected = [loop(name, channel) for channel in range(WIDTH)]
    # Half precision moves a distribution function by less than 0.0003, a few weights in a row by more.
    tolerance = {"ks": 2e-3, "ad": 1e-2, "energy": 1e-3}.get(name.rpartition("_")[0], 2e-6)
    assert table[name].tolist() == pytest.approx(expected, abs=tolerance, rel=1e-5)


def test_what_the_table_reads_are_the_slots_entries():
    channels, given = SiteChannels(tensors(), SITE), tensors()
    (conv,), (after, linear) = channels.incoming.parts, channels.outgoing.parts
    for part, expected in (
        (conv, given["conv"][3].flatten()),
        (after, given["next"][:, 5].flatten()),
        (linear, given["linear"][:, 12:16].flatten()),
    ):
        own = part.rows[3]
        assert (own / own.norm()).tolist() == pytest.approx((expected / expected.norm()).tolist(), abs=1e-6)
        assert part.rows.square().mean() == pytest.approx(1)
        assert part.square[3] == pytest.approx(float(expected.square().sum()))
    assert [part.values.shape[1:] for part in (conv, after, linear)] == [(6, 1, 3, 3), (5, 1, 1, 3), (7, 4)]
    assert [part.kernel for part in (conv, after, linear)] == [(3, 3), (1, 3), ()]


def test_distances_beside_scipy():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(12, 150)) * rng.uniform(0.5, 2, size=(12, 1))).astype(np.float16)
    rows[3] = rows[4]  # ties across rows
    rows[5] = 0.25  # and within one
    found = distances(rows.astype(np.float32))  # of halves: nothing is rounded
    everything = rows.astype(np.float64).ravel()
    for index, row in enumerate(rows.astype(np.float64)):
        assert found.ks[index] == pytest.approx(stats.ks_2samp(row, everything).statistic, abs=1e-12)
        assert found.energy[index] == pytest.approx(stats.energy_distance(row, everything), abs=1e-7)


def test_anderson_darling_is_the_integral():
    # n times the mean square difference of the distribution functions, over its variance u(1 - u).
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(3, 40)).astype(np.float16).astype(np.float32)
    found = distances(rows)
    pool, count = np.sort(rows, axis=None), rows.size
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    middles = (np.searchsorted(pool, rows, "left") + np.searchsorted(pool, rows, "right")) / 2 / count
    for index, own in enumerate(middles):
        empirical = np.searchsorted(np.sort(own), u, "right") / own.size
        integral = own.size * np.mean((empirical - u) ** 2 / (u * (1 - u)))
        assert found.ad[index] == pytest.approx(integral, rel=1e-3)


def test_half_precision_in_the_order_of_the_values():
    values = np.array([-np.inf, -3e4, -1.0, -1e-7, -0.0, 0.0, 1e-7, 1.0, 3e4], dtype=np.float32)
    codes = encode(values)
    assert (np.diff(codes.astype(int)) >= 0).all() and codes[4] == codes[5]
    assert decode(codes).tolist() == values.astype(np.float16).astype(float).tolist()
    assert decode(encode(np.zeros(1, dtype=np.float32))) == 0


def test_zeros_of_both_signs_are_equal():
    rows = np.array([[0.0, 0.0], [-0.0, -0.0], [1.0, -1.0]], dtype=np.float32)
    found = distances(rows)
    assert found.ks[0] == found.ks[1] and found.energy[0] == found.energy[1]


def test_noise_is_rough_out_of_the_subspace_and_like_no_other():
    given = tensors()
    shapes = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    profile = torch.linspace(0.2, 3, 6)[:, None, None]
    gains = torch.linspace(1, 2, WIDTH)[:, None, None, None]
    given["conv"] = gains * profile * shapes * (1 + 0.1 * given["conv"].sign())
    given["conv"][4] = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(2))
    table = features(given, [SITE])["site"]
    others = [c for c in range(WIDTH) if c != 4]
    assert table["roughness_in"][4] > table["roughness_in"][others].max()
    for name in ("profile_in", "subspace_in", "cosine_in"):
        assert table[name][4] < table[name][others].min()


def test_names_pick_and_order():
    table = features(tensors(), [SITE], ["kurtosis_out", "norm_in"])["site"]
    assert table.names == ("kurtosis_out", "norm_in") and table.values.shape == (WIDTH, 2)
    assert "norm_in" in table and "norm_out" not in table
    assert len(NAMES) == 2 * len(SIDES) + len(CHANNELS)
    everything = features(tensors(), [SITE])["site"]
    assert everything.names == NAMES
    assert torch.equal(table["norm_in"], everything["norm_in"])


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"'rougness_in'.*did you mean 'roughness_in'"):
        features(tensors(), [SITE], ["rougness_in"])


def test_the_tensors_of_another_network_are_refused():
    given = tensors()
    del given["next"]
    with pytest.raises(SiteError, match="'next'"):
        features(given, [SITE])
    with pytest.raises(SiteError, match="does not fit"):
        features(tensors() | {"next": torch.ones(5, 3, 1, 3)}, [SITE])


def test_what_a_site_lacks_is_left_out():
    linear = site(Slot("a", 0, Role.INCOMING), Slot("b", 1, Role.OUTGOING), width=4)
    given = {"a": torch.randn(4, 8), "b": torch.randn(3, 4)}
    names = set(features(given, [linear])["site"].names)
    assert names == {f"{n}_{s}" for n in SIDES if n != "roughness" for s in ("in", "out")} | {
        "out_given_in",
        "balance",
    }
    stream = site(Slot("b", 1, Role.OUTGOING), width=4)
    names = set(features(given, [stream])["site"].names)
    assert names == {f"{n}_out" for n in SIDES if n != "roughness"}
    bare = features(given, [site(Slot("a", 0, Role.BIAS), width=4)], ["norm_in"])["site"]
    assert bare.names == () and bare.values.shape == (4, 0) and bare.alive.all()


def test_buffers_that_no_state_dict_keeps_may_be_missing():
    given = tensors()
    frequencies = Slot("rope", 0, Role.SCALE, persistent=False)
    table = features(given, [site(*SITE.slots, frequencies)])["site"]
    assert torch.equal(table.values, features(given, [SITE])["site"].values)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.0])
def test_equal_weights_give_equal_finite_values(value):
    given = {name: torch.full_like(tensor, value) for name, tensor in tensors().items()}
    table = features(given, [SITE])["site"]
    assert torch.isfinite(table.values).all()
    assert (standardised(table).abs() < 1e-6).all()


def test_what_rounding_leaves_of_equal_values_is_no_distance():
    noise = 1 + 6e-8 * torch.randn(9, 2, dtype=torch.float64)
    assert not robust(torch.tensor([0.9, -7.0]) * noise).any()
    assert robust((1 + 1e-4 * torch.arange(9.0, dtype=torch.float64))[:, None]).max() > 1


def test_single_wild_channels_stay_finite():
    given = tensors()
    given["conv"][2] = 0
    given["next"][:, 4] = given["linear"][:, 8:12] = 0
    given["gamma"][1] = given["var"][3] = 0
    given["conv"][5] = torch.nan
    given["conv_bias"][0] = torch.inf
    table = features(given, [SITE])["site"]
    assert torch.isfinite(table.values).all() and torch.isfinite(standardised(table)).all()
    assert table.alive.tolist() == [channel != 2 for channel in range(WIDTH)]
    sound = features(tensors(), [SITE], ["roughness_in"])["site"]
    assert table["roughness_in"][6:].tolist() == pytest.approx(sound["roughness_in"][6:], abs=1e-6)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_channels(width):
    few = site(Slot("a", 0, Role.INCOMING), Slot("b", 1, Role.OUTGOING), width=width)
    table = features({"a": torch.randn(width, 2, 3, 3), "b": torch.randn(1, width)}, [few])["site"]
    assert torch.isfinite(table.values).all() and torch.isfinite(standardised(table)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    given = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    table = features(given, [SITE])["site"]
    assert table.values.dtype == torch.float64
    near = features({name: tensor.float() for name, tensor in given.items()}, [SITE])["site"]
    assert table.values.tolist() == pytest.approx(near.values, abs=1e-5)


def test_dead_channels_have_no_shape():
    given = tensors()
    given["conv"][6] *= 1e-2
    given["next"][:, 8] *= 1e-2
    given["linear"][:, 24:28] *= 1e-2
    table = features(given, [SITE])["site"]
    assert table.alive.tolist() == [channel != 6 for channel in range(WIDTH)]
    for name in ("roughness_in", "subspace_out", "cosine_in", "profile_out", "kurtosis_in"):
        column = table[name]
        assert column[6] == column[table.alive].median()
    assert table["norm_in"].argmin() == 6
    # Small weights on one side only may do harm: a normalisation behind them makes up for it.
    given["conv"][6] *= 1e2
    assert features(given, [SITE])["site"].alive.all()


def test_large_slots_are_thinned_by_whole_partners(monkeypatch):
    whole = features(tensors(), [SITE])["site"]
    monkeypatch.setattr(parts, "ENTRIES", WIDTH * 9 * 3)
    thin = features(tensors(), [SITE])["site"]
    assert torch.equal(thin["norm_in"], whole["norm_in"])
    assert not torch.equal(thin["roughness_in"], whole["roughness_in"])
    (conv,) = SiteChannels(tensors(), SITE).incoming.parts
    assert conv.values.shape == (WIDTH, 3, 1, 3, 3)
    kept = tensors()["conv"][:, [0, 2, 4]]
    assert torch.allclose(conv.values[:, :, 0], kept / kept.square().mean().sqrt())


def test_nothing_is_changed():
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    given = named_tensors(network)
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    chosen = site(Slot("0.weight", 0, Role.INCOMING), Slot("2.weight", 1, Role.OUTGOING), width=6)
    table = features(given, [chosen])["site"]
    assert all(torch.equal(tensor, before[name]) and tensor.requires_grad for name, tensor in given.items())
    assert not table.values.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_only_norms_and_entries_depend_on_the_unit(scale):
    given, scaled = tensors(), {name: tensor * scale for name, tensor in tensors().items()}
    for base in sorted(set(SIDES) - {"norm"}):
        names = [f"{base}_in", f"{base}_out"]
        found, before = features(scaled, [SITE], names)["site"], features(given, [SITE], names)["site"]
        assert found.values.tolist() == pytest.approx(before.values, rel=1e-3, abs=1e-3)


class Attention(nn.Module):
    """A layer of a transformer over patches, and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.grouped = nn.Sequential(nn.Conv1d(16, 8, 1), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 1))

    def forward(self, images):
        tokens = self.encoder(self.patches(images).flatten(2).transpose(1, 2))
        return self.grouped(tokens.transpose(1, 2)).mean(2)


def test_attention_and_groups():
    torch.manual_seed(0)
    network = Attention().eval()
    sites = find_sites(network, torch.randn(1, 3, 16, 16))
    tables = features(named_tensors(network), sites)
    assert any(s.contracted for s in sites) and len(sites) >= 3
    for found in sites:
        table = tables[found.name]
        assert table.values.shape[0] == found.width and torch.isfinite(table.values).all()
        assert {"norm_in", "subspace_in", "ks_out"} <= set(table.names)


def test_robust_scores_by_hand():
    columns = torch.tensor([[1.0, 5, 2], [2, 5, 2], [3, 5, 2], [4, 5, 2], [100, 6, 2]], dtype=torch.float64)
    scores = robust(columns)
    # Median 3, distances 2 1 0 1 97: median 1. The second column: distances 0 0 0 0 1, their mean 0.2.
    assert scores[:, 0].tolist() == pytest.approx([x / 1.4826 for x in (-2, -1, 0, 1, 97)])
    assert scores[:, 1].tolist() == pytest.approx([0, 0, 0, 0, 5 / 1.4826])
    assert scores[:, 2].tolist() == [0] * 5
    assert robust(torch.empty(3, 0, dtype=torch.float64)).shape == (3, 0)
