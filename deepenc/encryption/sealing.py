"""Bytes under a passphrase: scrypt makes the key, AES-GCM seals."""

from __future__ import annotations

import json
import os
import unicodedata
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from deepenc.errors import ConfigError, KeyFileError

FORMAT = "deepenc-key"
VERSION = 1
COST = 2**17
"""scrypt's n: 128 MiB of memory for every guess of the passphrase."""

_COSTS = range(2**10, 2**18 + 1)  # a forged header must not make a reader take all memory
_HEADER = ("format", "version", "kdf", "n", "r", "p", "salt", "cipher", "nonce")
_REMEDY = "restore the file from its original"


def lock(content: bytes, passphrase: str, cost: int = COST) -> bytes:
    """Seal bytes with a passphrase.

    Args:
        content: What to seal.
        passphrase: Not empty.
        cost: scrypt's n, a power of two in [2**10, 2**18].

    Returns:
        JSON, ASCII.

    Raises:
        ConfigError: The passphrase is empty, or the cost out of range.
    """
    if not passphrase:
        raise ConfigError("a key must be sealed with a passphrase of at least one character, got none")
    if not _is_cost(cost):
        raise ConfigError(f"expected a power of two in [2**10, 2**18] as scrypt cost, got {cost!r}")
    salt, nonce = os.urandom(16), os.urandom(12)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "kdf": "scrypt",
        "n": cost,
        "r": 8,
        "p": 1,
        "salt": salt.hex(),
        "cipher": "AES-256-GCM",
        "nonce": nonce.hex(),
    }
    sealed = AESGCM(_stretch(passphrase, salt, cost)).encrypt(nonce, content, _canonical(header))
    return _canonical(header | {"sealed": sealed.hex()})


def unlock(data: bytes, passphrase: str) -> bytes:
    """Open what `lock` sealed.

    Raises:
        KeyFileError: Another passphrase, or the data is cut, altered, or of another format.
    """
    document = _document(data)
    salt, nonce, sealed = (_unhex(document, field) for field in ("salt", "nonce", "sealed"))
    if (
        set(document) != {*_HEADER, "sealed"}
        or (document["kdf"], document["cipher"]) != ("scrypt", "AES-256-GCM")
        or (document["r"], document["p"]) != (8, 1)
        or not _is_cost(document["n"])
        or (len(salt), len(nonce)) != (16, 12)
        # Whatever parses to the same values (other spaces, another order) is an altered file all the same.
        or _canonical(document) != data
    ):
        raise KeyFileError(f"the key file's header was altered; {_REMEDY}")
    header = {field: document[field] for field in _HEADER}
    try:
        key = _stretch(passphrase, salt, document["n"])
        return AESGCM(key).decrypt(nonce, sealed, _canonical(header))
    except InvalidTag:
        raise KeyFileError(
            f"wrong passphrase, or the key file was altered; check the passphrase, or {_REMEDY}"
        ) from None


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("ascii"))
    except (ValueError, RecursionError):
        raise KeyFileError(
            f"expected a sealed key, got something cut or of another format; {_REMEDY}"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise KeyFileError(f"expected a file of format {FORMAT!r}; give the path of a key that deepenc saved")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise KeyFileError(f"the key file's version {version!r} is no version; {_REMEDY}")
    if version > VERSION:
        raise KeyFileError(
            f"the key file has version {version}, this deepenc reads up to {VERSION}; install a newer deepenc"
        )
    return document


def _unhex(document: dict[str, Any], field: str) -> bytes:
    try:
        found = bytes.fromhex(document[field])
        if found.hex() == document[field]:  # capital digits are an altered file, too
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise KeyFileError(f"the key file's field {field!r} is missing or altered; {_REMEDY}")


def _is_cost(n: object) -> bool:
    return type(n) is int and n in _COSTS and n & (n - 1) == 0


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _stretch(passphrase: str, salt: bytes, n: int) -> bytes:
    # One passphrase may reach us in several Unicode spellings, depending on the keyboard.
    spelled = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
    return Scrypt(salt=salt, length=32, n=n, r=8, p=1).derive(spelled)
