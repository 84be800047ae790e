from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.errors import ConfigError, DeepencError, KeyFileError, PluginError, SiteError
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


class Counts(Placement):
    """Allocates what it is told, sense or nonsense."""

    name: ClassVar[str] = "test-counts"
    counts: Any = 2

    def place(self, original, rng):
        if isinstance(self.counts, int):
            return {site.name: self.counts for site in original.sites}
        return self.counts


class Filler(Weights):
    """Fills with a constant, or breaks its interface in one way."""

    name: ClassVar[str] = "test-filler"
    fault: Literal["none", "shape", "nan", "dtype", "number", "type"] = "none"
    value: float = 0.5

    def fill(self, neurons, rng, channels):
        values = [gap.victim.new_full(gap.shape, self.value) for gap in neurons.gaps]
        if self.fault == "shape":
            values[-1] = values[-1][..., :1].repeat_interleave(99, -1)
        elif self.fault == "nan":
            values[-1].view(-1)[-1] = float("nan")
        elif self.fault == "dtype":
            values[-1] = values[-1].double()
        elif self.fault == "number":
            values.pop()
        elif self.fault == "type":
            return [value.tolist() for value in values]
        return values


class Random(Weights):
    """Normal numbers."""

    name: ClassVar[str] = "test-random"

    def fill(self, neurons, rng, channels):
        return [torch.from_numpy(rng.standard_normal(gap.shape)).to(gap.victim) for gap in neurons.gaps]


class Harden(Hardening):
    """Changes confusion entries, or what it must not."""

    name: ClassVar[str] = "test-harden"
    fault: Literal["none", "real", "other", "shape", "nan", "buffer"] = "none"

    def harden(self, network, layout, original, rng):
        state = network.state_dict()
        name = next(layout.changed())
        real = layout.kept(name, layout.narrowed_shape(name, state[name].shape))
        dim, index = next(iter(real.items()))
        inserted = torch.ones(state[name].shape[dim], dtype=torch.bool)
        inserted[index] = False
        if self.fault == "none":
            state[name].index_fill_(dim, inserted.nonzero().flatten(), 7.0)
        elif self.fault == "real":
            state[name].select(dim, int(index[0])).reshape(-1)[:1].add_(1e-3)
            state[name].index_fill_(dim, index[:1], 1.0)
        elif self.fault == "other":
            state["3.bias"].add_(1)
        elif self.fault == "shape":
            network[0].bias = nn.Parameter(torch.zeros(3))
        elif self.fault == "nan":
            state[name].index_fill_(dim, inserted.nonzero().flatten(), float("nan"))
        elif self.fault == "buffer":
            network.register_buffer("more", torch.zeros(1))


def defense(counts: Any = 2, weights: Weights | None = None, *hardening: Hardening) -> Defense:
    return Defense(
        name="test", placement=Counts(counts=counts), weights=weights or Random(), hardening=hardening
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        torch.equal(t, second[n]) and t.dtype == second[n].dtype for n, t in first.items()
    )


def test_decrypted_network_is_the_victim_bit_for_bit(net: Net) -> None:
    model, inputs, sites = net
    before = copy.deepcopy(model)
    wanted = model(inputs)
    encrypted, key = encrypt(model, inputs, defense(3), seed=0, sites=sites)
    assert same(model, before)
    assert not torch.allclose(encrypted(inputs), wanted)
    assert encrypted(inputs).shape == wanted.shape
    original = decrypt(encrypted, key)
    assert same(original, model)
    assert torch.equal(original(inputs), wanted)
    assert key.allocation == {site.name: 3 for site in sites}


def test_confusion_channels_with_zero_weights_change_no_output(net: Net) -> None:
    # The inserted entries of outgoing tensors are zero, so that only misplaced real entries could show.
    model, inputs, sites = net
    encrypted, _ = encrypt(model, inputs, defense(2, Filler(value=0.0)), seed=1, sites=sites)
    assert torch.allclose(encrypted(inputs), model(inputs), atol=1e-5)


def test_sites_found_by_tracing_do_as_well(net: Net) -> None:
    model, inputs, _ = net
    encrypted, key = encrypt(model, inputs, defense(2), seed=0)
    assert key.entropy > 0
    assert same(decrypt(encrypted, key), model)
    assert list(key.sites) == find_sites(model, inputs)


def test_encrypted_network_shares_no_memory_with_the_victim(net: Net) -> None:
    model, inputs, sites = net
    for chosen in (defense(2), "null"):
        encrypted, key = encrypt(model, inputs, chosen, seed=0, sites=sites)
        before = copy.deepcopy(model)
        original = decrypt(encrypted, key)
        for tensor in (*encrypted.state_dict().values(), *original.state_dict().values()):
            tensor.fill_(9)
        assert same(model, before)


def test_every_forged_entry_is_filled_and_no_other_changed(net: Net) -> None:
    model, inputs, sites = net
    encrypted, key = encrypt(model, inputs, defense(3, Filler(value=77.0)), seed=4, sites=sites)
    victim = model.state_dict()
    layout = key.layout()
    changed = set(layout.changed())
    assert changed
    for name, tensor in encrypted.state_dict().items():
        if name in changed:
            assert (tensor == 77.0).sum() == tensor.numel() - victim[name].numel() > 0
    assert "1.num_batches_tracked" not in changed


def test_tied_tensors_stay_tied(tied_net: Net) -> None:
    model, inputs, sites = tied_net
    encrypted, key = encrypt(model, inputs, defense(2, None, Harden()), seed=0, sites=sites)
    assert encrypted.left.weight is encrypted.right.weight
    original = decrypt(encrypted, key)
    assert original.left.weight is original.right.weight
    assert same(original, model)


def test_modes_gradients_and_buffers_are_taken_over(small: Net) -> None:
    model, inputs, sites = small
    model.train()
    model[0].weight.requires_grad_(False)
    model[1].num_batches_tracked.fill_(5)
    encrypted, key = encrypt(model, inputs, defense(2), seed=0, sites=sites)
    assert encrypted.training and not encrypted[0].weight.requires_grad and encrypted[3].weight.requires_grad
    assert encrypted[1].num_batches_tracked == 5 and encrypted[1].num_features == 8
    assert same(decrypt(encrypted, key), model)


def test_double_and_half_precision(small: Net) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = copy.deepcopy(small[0]).to(dtype)
        encrypted, key = encrypt(model, small[1], defense(2), seed=0, sites=small[2])
        assert encrypted[0].weight.dtype == dtype
        assert same(decrypt(encrypted, key), model)


def test_seeds_and_secrets(two_sites: Net) -> None:
    model, inputs, sites = two_sites

    def run(**fields: Any) -> tuple[str, dict[str, tuple[int, ...]]]:
        encrypted, key = encrypt(model, inputs, defense(3), sites=sites, **fields)
        assert key.fingerprint == fingerprint(encrypted.state_dict())
        return key.fingerprint, dict(key.positions)

    assert run(seed=1) == run(seed=1) != run(seed=2)
    assert run(secret=b"x" * 32) == run(secret=b"x" * 32)
    assert run() != run()
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    run(seed=3)
    assert torch.equal(state[0], torch.random.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_null_defense_is_a_copy_with_an_empty_key(small: Net) -> None:
    model, inputs, sites = small
    encrypted, key = encrypt(model, inputs, "null", seed=0, sites=sites)
    assert same(encrypted, model) and encrypted is not model
    assert key.positions == {} and key.entropy == 0
    assert same(decrypt(encrypted, key), model)


@pytest.mark.parametrize("fault", ["shape", "nan", "dtype", "number", "type"])
def test_broken_weights_are_caught(small: Net, fault: Any) -> None:
    model, inputs, sites = small
    with pytest.raises(PluginError, match=r"test-filler.*site '0'"):
        encrypt(model, inputs, defense(2, Filler(fault=fault)), seed=0, sites=sites)


@pytest.mark.parametrize("fault", ["real", "other", "shape", "nan", "buffer"])
def test_hardening_that_touches_more_than_confusion_entries_is_caught(small: Net, fault: Any) -> None:
    model, inputs, sites = small
    before = copy.deepcopy(model)
    with pytest.raises(PluginError, match="test-harden"):
        encrypt(model, inputs, defense(2, None, Harden(fault=fault)), seed=0, sites=sites)
    assert same(model, before)


def test_hardening_that_keeps_its_word(net: Net) -> None:
    model, inputs, sites = net
    encrypted, key = encrypt(model, inputs, defense(2, None, Harden()), seed=0, sites=sites)
    assert any((tensor == 7.0).any() for tensor in encrypted.state_dict().values())
    assert same(decrypt(encrypted, key), model)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (0, ConfigError, "rounds to no channel"),
        ({}, ConfigError, "rounds to no channel"),
        ({"zz": 1}, PluginError, "no site 'zz'"),
        ({"0": -1}, PluginError, ">= 0"),
        ({"0": 1.5}, PluginError, "integer"),
        ({"0": True}, PluginError, ">= 0"),
        ({"0": None}, PluginError, "integer"),
        ([3], PluginError, "mapped"),
    ],
)
def test_allocations_that_cannot_be_meant(small: Net, counts, error, message) -> None:
    model, inputs, sites = small
    with pytest.raises(error, match=message) as caught:
        encrypt(model, inputs, defense(counts), seed=0, sites=sites)
    assert "test-counts" in str(caught.value)


def test_allocation_in_numpy_integers_is_fine(small: Net) -> None:
    model, inputs, sites = small
    _, key = encrypt(model, inputs, defense({"0": np.int64(2)}), seed=0, sites=sites)
    assert key.allocation == {"0": 2}


def test_bad_arguments(small: Net) -> None:
    model, inputs, sites = small
    elsewhere = (Site("x", 6, (Slot("nowhere", 0, Role.INCOMING), Slot("3.weight", 1, Role.OUTGOING))),)
    too_wide = (Site("0", 60, sites[0].slots),)
    for bad, message in (
        ({"sites": ()}, "no site"),
        ({"sites": sites * 2}, "twice"),
        ({"sites": elsewhere}, "lacks"),
        ({"sites": too_wide}, "shape"),
        ({"secret": b"short"}, "32 bytes"),
        ({"secret": bytes(32), "seed": 1}, "both"),
    ):
        with pytest.raises(DeepencError, match=message):
            encrypt(model, inputs, defense(2), **({"sites": sites} | bad))
    with pytest.raises(PluginError, match="paper-samp"):
        encrypt(model, inputs, "paper-sam", sites=sites)
    with pytest.raises(ConfigError, match="placement"):
        encrypt(model, inputs, {"name": "half", "weights": Random()}, sites=sites)
    with pytest.raises(ConfigError, match="defense"):
        encrypt(model, inputs, 5, sites=sites)


def test_a_key_opens_its_own_network_only(two_sites: Net) -> None:
    model, inputs, sites = two_sites
    encrypted, key = encrypt(model, inputs, defense(2), seed=0, sites=sites)
    _, other = encrypt(model, inputs, defense(2), seed=1, sites=sites)
    with pytest.raises(KeyFileError, match="another network or key"):
        decrypt(encrypted, other)
    with pytest.raises(KeyFileError):
        decrypt(model, key)
    encrypted[0].bias.data[0] += 1
    with pytest.raises(KeyFileError, match="changed"):
        decrypt(encrypted, key)


def test_reshelter_keeps_positions_and_draws_new_weights(two_sites: Net) -> None:
    model, inputs, sites = two_sites
    encrypted, key = encrypt(model, inputs, defense(2), seed=0, sites=sites)
    tuned = decrypt(encrypted, key)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    again, new = reshelter(tuned, key, defense(5), example=inputs, seed=0)
    assert new.positions == key.positions and new.sites == key.sites and new.fingerprint != key.fingerprint
    assert same(decrypt(again, new), tuned)
    inserted = list(key.positions["0"])
    assert not (again[0].weight[inserted] == encrypted[0].weight[inserted]).any()
    with pytest.raises(KeyFileError):
        decrypt(again, key)


def test_reshelter_of_what_does_not_fit(two_sites: Net, small: Net) -> None:
    model, inputs, sites = two_sites
    _, key = encrypt(model, inputs, defense(2), seed=0, sites=sites)
    with pytest.raises(ConfigError, match="inserts nothing"):
        reshelter(model, key, "null", example=inputs)
    with pytest.raises(SiteError):
        reshelter(small[0], key, defense(2), example=small[1])


def test_hardening_gets_the_layout_of_the_network(two_sites: Net) -> None:
    seen: list[Layout] = []

    class Look(Hardening):
        name: ClassVar[str] = "test-look"

        def harden(self, network, layout, original, rng):
            seen.append(layout)
            assert original.data is not None

    model, inputs, sites = two_sites
    _, key = encrypt(model, inputs, defense(2, None, Look()), seed=0, sites=sites, data=inputs)
    assert seen[0].positions == dict(key.positions)


def test_what_is_no_key(small: Net) -> None:
    for wrong in (None, "owner.key", b"key"):
        with pytest.raises(ConfigError, match=r"expected a Key, got .*load_key"):
            decrypt(small[0], wrong)  # type: ignore[arg-type]
