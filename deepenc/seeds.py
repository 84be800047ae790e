"""Every secret and seed of an experiment: derived here and nowhere else, so that fairness fits on a page.

Two sides draw at random: the defender (secrets of keys, positions that leak) and the attackers (their images,
their initialisations). An attacker is told his own seed; nothing on his side may lead back to the defender's:

- Without a seed, the root is 32 random bytes; both sides derive from it by HMAC, which nobody inverts.
- With one (``seed: 77``), the defender's side derives from the seed, slowly (scrypt), since seeds can be
  guessed. The attackers' side does not depend on the seed: an attacker's own seed confirms no guess.

Derived values keep all 32 bytes; only where a library asks for an integer, `number` cuts them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import numpy as np
import torch

from deepenc.errors import ConfigError

SIZE = 32
"""Bytes of a root and of all that is derived."""


def derive(root: bytes, role: str, *parts: Any) -> bytes:
    """32 bytes that depend on all arguments and lead back to none of them (HMAC-SHA256).

    Args:
        root: 32 secret bytes.
        role: What they are for.
        *parts: Which of them: plain data, as JSON writes it.
    """
    return hmac.digest(root, json.dumps([role, *parts], sort_keys=True).encode(), "sha256")


def number(material: bytes) -> int:
    """An integer in [0, 2**63) made of derived bytes, as torch and numpy take it."""
    return int.from_bytes(material[:8]) >> 1


@dataclass(frozen=True)
class Roots:
    """Where the defender's and the attackers' secrets and seeds begin, 32 bytes each."""

    defender: bytes = field(repr=False)
    attackers: bytes = field(repr=False)

    @classmethod
    def of(cls, root: bytes) -> Self:
        """Both sides, of 32 random bytes."""
        return cls(derive(root, "defender"), derive(root, "attackers"))

    @classmethod
    def of_seed(cls, seed: int) -> Self:
        """Both sides, for an experiment that must be repeatable; other seeds change the defender's alone."""
        return cls(_stretched(seed), hashlib.sha256(b"deepenc attackers").digest())

    def below(self, role: str, *parts: Any) -> Self:
        """Roots of a part of the experiment, as for `derive`, each derived from its own side."""
        return type(self)(derive(self.defender, role, *parts), derive(self.attackers, role, *parts))

    def hex(self) -> str:
        """As text, for storing."""
        return (self.defender + self.attackers).hex()

    @classmethod
    def fromhex(cls, text: str) -> Self:
        """From `hex`, or from the text of 32 random bytes.

        Raises:
            ConfigError: It is neither.
        """
        try:
            content = bytes.fromhex(text)
        except ValueError:
            content = b""
        if len(content) == SIZE:
            return cls.of(content)
        if len(content) == 2 * SIZE:
            return cls(content[:SIZE], content[SIZE:])
        raise ConfigError(f"expected a root of {SIZE} or {2 * SIZE} bytes in hex, got {len(text)} characters")


def random_root() -> str:
    """32 random bytes as text, for `Roots.fromhex`."""
    return os.urandom(SIZE).hex()


@cache
def _stretched(seed: int) -> bytes:
    salt = b"deepenc experiment"  # no secret: it keeps apart from other uses of the same number
    return hashlib.scrypt(str(seed).encode(), salt=salt, n=2**16, r=8, p=1, maxmem=2**27, dklen=SIZE)


@contextmanager
def isolated(seed: int, device: str = "cpu") -> Iterator[None]:
    """Keep all global generators as they were; inside, they start from a given seed.

    Libraries draw from them (dropout, data loaders): so a duel depends on its seed alone, wherever and after
    whatever it is run. Gradients are on inside.

    Args:
        seed: Where the generators start inside: the attacker's seed, or one derived from the secret.
        device: ``"cpu"`` or ``"cuda"``.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - other people's code uses it
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
