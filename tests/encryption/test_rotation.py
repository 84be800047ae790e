"""Rotation, and what two releases of one model give away (docs/keys.md has these figures)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
from deepenc.encryption.keys.key import Key
from deepenc.errors import ConfigError, KeyFileError
from deepenc.network.sites import Site
from deepenc.plugins import build
from deepenc.victims.data.cache import cache_folder

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
DEFENSE = {"base": "paper-init", "name": "test", "placement": "absolute:count=3"}


def equal(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


def test_a_rotated_key_has_new_positions_and_the_old_one_opens_nothing(net: Net) -> None:
    model, inputs, sites = net
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    again, fresh = reshelter(decrypt(encrypted, key), key, DEFENSE, example=inputs, rotate=True, seed=1)
    assert fresh.allocation == key.allocation and fresh.positions != key.positions
    assert equal(decrypt(again, fresh), model)
    for network, other in ((again, key), (encrypted, fresh)):
        with pytest.raises(KeyFileError, match="another network or key"):
            decrypt(network, other)


def test_the_secret_of_a_rotation_is_a_whole_key(two_sites: Net) -> None:
    model, inputs, sites = two_sites
    _, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    _, rotated = reshelter(model, key, DEFENSE, example=inputs, rotate=True, secret=bytes(range(32)))
    _, direct = encrypt(model, inputs, DEFENSE, secret=bytes(range(32)), sites=sites)
    assert rotated.positions == direct.positions


def test_rotation_with_the_old_seed_is_refused_and_resheltering_keeps_positions(two_sites: Net) -> None:
    model, inputs, sites = two_sites
    _, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    with pytest.raises(ConfigError, match="another secret or seed"):
        reshelter(model, key, DEFENSE, example=inputs, rotate=True, seed=0)
    assert reshelter(model, key, DEFENSE, example=inputs, seed=0)[1].positions == key.positions


def read_off(first: nn.Module, second: nn.Module, sites: tuple[Site, ...]) -> dict[str, tuple[int, ...]]:
    """Positions that the first release's tensors tell, beside the second: channels not found in both.

    A channel is told by its entries in the tensors of one dimension (BatchNorm, biases), which no other
    site's channels touch.
    """
    told = {}
    for site in sites:
        rows = []
        for network in (first, second):
            state = network.state_dict()
            one = [
                state[slot.tensor] for slot in site.slots if state[slot.tensor].ndim == 1 and not slot.start
            ]
            rows.append([np.array(row).tobytes() for row in zip(*(t.tolist() for t in one), strict=True)])
        told[site.name] = tuple(place for place, row in enumerate(rows[0]) if row not in set(rows[1]))
    return told


def test_two_releases_under_different_keys_tell_both() -> None:
    model, example = build("victim", "digits-resnet").network(cache_folder())
    keys: list[Key] = []
    releases: list[nn.Module] = []
    for seed in (1, 2):
        network, key = encrypt(model, example, "paper-samp", seed=seed)
        releases.append(network)
        keys.append(key)
    sites = keys[0].sites
    exact = []
    for mine, other in ((0, 1), (1, 0)):
        told = read_off(releases[mine], releases[other], sites)
        exact.append(sum(told[site.name] == keys[mine].positions[site.name] for site in sites))
    assert exact == [len(sites)] * 2
