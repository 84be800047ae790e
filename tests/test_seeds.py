"""Nothing on the attackers' side leads back to the defender's; equal seeds repeat, others do not."""

import hashlib
import hmac
import random

import numpy as np
import pytest
import torch

from deepenc.errors import ConfigError
from deepenc.seeds import Roots, derive, isolated, number, random_root


def test_derived_values_are_hmacs_of_all_that_they_depend_on():
    root = bytes(range(32))
    expected = hmac.new(root, b'["role", {"a": 1, "b": 2}, 3]', hashlib.sha256).digest()
    assert derive(root, "role", {"b": 2, "a": 1}, 3) == expected
    others = [derive(root, "role"), derive(root, "role", 1), derive(root, "role", "1"), derive(root, "role1")]
    assert len({*others, derive(bytes(32), "role")}) == 5
    assert number(b"\xff" * 32) == 2**63 - 1 and number(bytes(32)) == 0


def test_a_seed_moves_the_defenders_side_alone():
    """Whoever tries seeds sees the same attackers' seeds under each of them."""
    one, other = Roots.of_seed(77), Roots.of_seed(78)
    assert one.attackers == other.attackers and one.defender != other.defender
    assert one.below("x").attackers == other.below("x").attackers != one.attackers
    assert one == Roots.of_seed(77)
    slow = hashlib.scrypt(b"77", salt=b"deepenc experiment", n=2**16, r=8, p=1, maxmem=2**27, dklen=32)
    assert one.defender == slow


def test_random_roots_move_both_sides_and_survive_as_text():
    text = random_root()
    roots, other = Roots.fromhex(text), Roots.fromhex(random_root())
    assert len({roots.defender, roots.attackers, other.defender, other.attackers, bytes.fromhex(text)}) == 5
    assert Roots.fromhex(roots.hex()) == roots and Roots.of(bytes.fromhex(text)) == roots
    assert text not in repr(roots) and roots.defender.hex() not in roots.below("x").hex()
    for broken in ("zz", "00", "", "00" * 33):
        with pytest.raises(ConfigError, match="expected a root of 32 or 64 bytes"):
            Roots.fromhex(broken)


def test_all_global_generators_start_from_the_seed_and_go_back():
    def draw():
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with isolated(5), torch.no_grad():
        first = draw()
    with torch.inference_mode(), isolated(5):
        assert draw() == first and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with isolated(6):
        assert draw() != first
    assert torch.equal(state, torch.get_rng_state())
