from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from itertools import combinations
from math import comb, log2

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, secret_bytes
from deepenc.encryption.keys.secret import derive_positions, derive_rng, secret_of
from deepenc.errors import ConfigError, SiteError
from deepenc.network.sites import Role, Site, Slot

SITES = (
    Site("a", 4, (Slot("a.weight", 0, Role.INCOMING), Slot("b.weight", 1, Role.OUTGOING))),
    Site("b", 3, (Slot("b.weight", 0, Role.INCOMING), Slot("c.weight", 1, Role.OUTGOING))),
    Site("c", 9, (Slot("c.weight", 0, Role.INCOMING), Slot("d.weight", 1, Role.OUTGOING))),
)
KEY = Key(SITES, {"a": (0, 5), "b": (1,)}, "f" * 64)


def test_entropy_and_configuration_by_hand() -> None:
    assert KEY.allocation == {"a": 2, "b": 1, "c": 0}
    assert KEY.bits == {"a": log2(15), "b": 2.0, "c": 0.0}
    assert KEY.entropy == pytest.approx(5.906890595608519)


def test_entropy_of_sites_whose_combinations_exceed_any_float() -> None:
    wide = Site("w", 4096, SITES[0].slots)
    bits = Key((wide,), {"w": tuple(range(2048))}, "").entropy
    assert bits == pytest.approx(sum(np.log2((4096 + i) / i) for i in range(1, 2049)), rel=1e-12)


def test_secret_bytes_are_what_is_sealed_but_for_what_is_fixed() -> None:
    # "a":[2,"a"] and "b":[1,"1"], and a comma between them: ranks 10 and 1, in hexadecimal digits.
    assert secret_bytes(KEY) == len('"a":[2,"a"],"b":[1,"1"]')
    assert secret_bytes(replace(KEY, positions={})) == 0
    assert secret_bytes(replace(KEY, withheld=b"x" * 3000)) == secret_bytes(KEY) + 4000, "as base64"
    assert secret_bytes(replace(KEY, fingerprint="0" * 64, binding=b"b" * 32)) == secret_bytes(KEY)


def test_ranks_are_integers_and_make_the_same_key() -> None:
    # In colexicographic order: (0, 5) comes after the comb(5, 2) pairs below 5; (1,) is the second of four.
    assert KEY.ranks() == {"a": 10, "b": 1}
    assert Key.from_ranks(SITES, KEY.allocation, KEY.ranks(), KEY.fingerprint) == KEY


def test_positions_stay_out_of_the_repr_and_a_key_can_travel_to_a_worker() -> None:
    assert "positions" not in repr(KEY)
    assert pickle.loads(pickle.dumps(KEY)) == KEY


@pytest.mark.parametrize(
    ("allocation", "ranks", "error"),
    [
        ({"a": 2}, {"a": 15}, ConfigError),
        ({"a": 2}, {"a": -1}, ConfigError),
        ({"a": 2}, {}, ConfigError),
        ({"a": 2}, {"a": 0, "b": 0}, ConfigError),
        ({"z": 2}, {"z": 0}, SiteError),
        ({"a": -2}, {"a": 0}, SiteError),
    ],
)
def test_integers_that_make_no_key_are_refused(allocation, ranks, error) -> None:
    with pytest.raises(error):
        Key.from_ranks(SITES, allocation, ranks, "")


@pytest.mark.parametrize(
    "positions", [{"z": (0,)}, {"a": (6, 7)}, {"a": (1, 0)}, {"a": (1, 1)}, {"a": (-1,)}]
)
def test_positions_that_do_not_fit_are_refused(positions) -> None:
    with pytest.raises(SiteError):
        Key(SITES, positions, "")


def test_sites_of_one_name_are_refused() -> None:
    with pytest.raises(SiteError, match="twice"):
        Key((SITES[0], SITES[0]), {}, "")


def test_positions_are_uniform_over_all_combinations() -> None:
    draws = Counter(derive_positions(secret_of(seed), SITES[:1], {"a": 2})["a"] for seed in range(3000))
    assert set(draws) == set(combinations(range(6), 2))
    assert chisquare(list(draws.values())).pvalue > 1e-3


def test_positions_of_two_sites_are_independent() -> None:
    twins = tuple(Site(name, 4, SITES[0].slots) for name in "ab")
    pairs = Counter()
    for seed in range(2000):
        drawn = derive_positions(secret_of(seed), twins, {"a": 1, "b": 1})
        pairs[drawn["a"], drawn["b"]] += 1
    assert len(pairs) == 25
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_positions_depend_on_the_secret_and_the_site_alone() -> None:
    allocation = {"a": 2, "b": 1, "c": 4}
    secret = secret_of(7)
    drawn = derive_positions(secret, SITES, allocation)
    assert derive_positions(secret, SITES[::-1], allocation) == drawn
    assert derive_positions(secret, SITES[2:], allocation) == {"c": drawn["c"]}
    assert derive_positions(secret_of(8), SITES, allocation) != drawn
    assert derive_positions(secret, SITES, {}) == {}


def test_a_known_secret_keeps_its_positions() -> None:
    # Keys in use must open after every later change of the code.
    wide = Site("conv", 1000, SITES[0].slots)
    assert derive_positions(bytes(range(32)), (wide,), {"conv": 5})["conv"] == KNOWN


KNOWN = (213, 287, 732, 816, 879)


def test_weights_are_drawn_from_other_numbers_than_positions() -> None:
    secret = secret_of(0)
    first = derive_rng(secret, "weights", "a").integers(2**62, size=4)
    assert (derive_rng(secret, "weights", "a").integers(2**62, size=4) == first).all()
    for purpose, site in [("weights", "b"), ("placement", "a"), ("weights", "")]:
        assert not (derive_rng(secret, purpose, site).integers(2**62, size=4) == first).any()
    with pytest.raises(ConfigError, match="positions"):
        derive_rng(secret, "positions", "a")


def test_secrets() -> None:
    assert secret_of(secret=bytes(32)) == bytes(32)
    assert secret_of(3) == secret_of(np.int64(3)) != secret_of(4)
    assert secret_of() != secret_of()
    for bad in ({"seed": 1, "secret": bytes(32)}, {"secret": bytes(31)}, {"secret": "x" * 32}, {"seed": 1.5}):
        with pytest.raises(ConfigError):
            secret_of(**bad)


def test_fingerprint_sees_names_dtypes_shapes_and_bytes_but_not_order_or_strides() -> None:
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}
    same = {"b": torch.tensor(3), "a": torch.arange(6.0).reshape(2, 3).T.contiguous().T}
    assert fingerprint(base) == fingerprint(same)
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(3, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"]},
        {"a": -base["a"], "b": base["b"]},  # the zero's sign is a bit too
        {**base, "c": torch.empty(0)},
    ]
    assert len({fingerprint(t) for t in [base, *others]}) == 7
    assert len(fingerprint({})) == 64


def test_fingerprint_of_half_precision_and_of_a_known_tensor() -> None:
    assert fingerprint({"a": torch.ones(2, dtype=torch.bfloat16)}) != fingerprint({"a": torch.ones(2)})


def test_number_of_keys_is_the_number_of_positions() -> None:
    seen = {Key.from_ranks(SITES, {"b": 2}, {"b": n}, "").positions["b"] for n in range(comb(5, 2))}
    assert seen == set(combinations(range(5), 2))
