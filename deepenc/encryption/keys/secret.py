"""All that is drawn at an encryption, expanded from 32 secret bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from math import comb

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from deepenc.encryption.keys.ranks import unrank
from deepenc.errors import ConfigError
from deepenc.network.sites import Site


def secret_of(seed: int | None = None, secret: bytes | None = None) -> bytes:
    """The 32-byte secret that a seed stands for, or a given one, or a fresh one where neither is given.

    Raises:
        ConfigError: Both are given, or the secret is not 32 bytes.
    """
    if secret is not None:
        if seed is not None:
            raise ConfigError("expected a seed or a secret, got both; leave one out")
        if not isinstance(secret, bytes) or len(secret) != 32:
            raise ConfigError(f"expected a secret of 32 bytes, got {_measure(secret)}; try os.urandom(32)")
        return secret
    if seed is None:
        return os.urandom(32)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ConfigError(f"expected an integer as seed, got {seed!r}")
    return hashlib.sha256(f"deepenc seed {int(seed)}".encode()).digest()


def _measure(secret: object) -> str:
    return f"{len(secret)}" if isinstance(secret, bytes) else type(secret).__name__


def derive_positions(
    secret: bytes, sites: Sequence[Site], allocation: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Draw the positions of the confusion channels from a secret, uniformly over all combinations.

    Sites are independent of one another: knowing the positions of some tells nothing of the others.

    Args:
        secret: 32 bytes.
        sites: The victim's sites.
        allocation: Confusion channels per site, ``>= 0``.

    Returns:
        Ascending positions for each site that gets any.
    """
    positions = {}
    for site in sites:
        if count := allocation.get(site.name, 0):
            total = site.width + count
            number = _below(comb(total, count), _expand(secret, "positions", site.name))
            positions[site.name] = unrank(number, total, count)
    return positions


def derive_binding(secret: bytes) -> bytes:
    """The 32 bytes with which a key signs the headers of its releases; they lead back to nothing else."""
    return _expand(secret, "binding", "")


def derive_rng(secret: bytes, purpose: str, site: str = "") -> np.random.Generator:
    """A generator for confusion weights and the like, never for positions.

    It is not a cryptographic one: whoever sees enough of its numbers can tell the rest. They lead
    neither back to the secret nor to the positions, which are expanded from the secret on their own.

    Args:
        secret: 32 bytes.
        purpose: What the numbers are for; other purposes get independent numbers.
        site: Name of the site they are for, if it is one.

    Raises:
        ConfigError: The purpose is ``"positions"`` or ``"binding"``.
    """
    if purpose in ("positions", "binding"):
        raise ConfigError(f"the purpose {purpose!r} belongs to the key alone; choose another")
    return np.random.Generator(np.random.PCG64(int.from_bytes(_expand(secret, purpose, site))))


def _expand(secret: bytes, purpose: str, site: str) -> bytes:
    info = json.dumps(["deepenc", 1, purpose, site]).encode()
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)


def _below(limit: int, stream_key: bytes) -> int:
    """A uniform integer in ``[0, limit)``, by rejection from a ChaCha20 stream."""
    bits = (limit - 1).bit_length()
    size = (bits + 7) // 8
    stream = Cipher(algorithms.ChaCha20(stream_key, bytes(16)), mode=None).encryptor()
    while True:
        number = int.from_bytes(stream.update(bytes(size))) >> (8 * size - bits)
        if number < limit:
            return number
