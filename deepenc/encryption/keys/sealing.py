"""Bytes under a passphrase, and for recipients: AES-GCM seals them, and each opening wraps the file's key."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from deepenc.encryption.keys.recipients import MAX_RECIPIENTS, WRAPPED, unwrap, wrap
from deepenc.errors import ConfigError, KeyFileError

FORMAT = "deepenc-key"
VERSION = 1
COST = 2**17
"""scrypt's n: 128 MiB of memory for every guess of the passphrase."""

_COSTS = range(2**10, 2**18 + 1)  # a forged header must not make a reader take all memory
_KDF = {"kdf": "scrypt", "n": COST, "r": 8, "p": 1, "salt": ""}
_FIELDS = {"format", "version", "cipher", "passphrase", "recipients", "nonce", "sealed"}
_MOST = {b",": MAX_RECIPIENTS + 32, b"[": 1, b"{": 2}  # in a key file; parsing more would take memory
_REMEDY = "restore the file from its original"
ONLY_RECIPIENTS = (
    "the key has no passphrase: it was sealed for recipients only; give a recipient's private key "
    "(`--identity`)"
)


def lock(
    content: bytes,
    passphrase: str | None = None,
    cost: int = COST,
    *,
    recipients: Sequence[X25519PublicKey] = (),
) -> bytes:
    """Seal bytes with a passphrase, for recipients, or both: each opens them alone.

    A fresh file key seals the content. scrypt and AES-256-GCM wrap it for the passphrase, HPKE (RFC 9180,
    base mode: X25519, HKDF-SHA256, AES-256-GCM) for each recipient. Everything else in the file is
    associated data of the content's seal.

    Args:
        content: What to seal.
        passphrase: Not empty; None for recipients only.
        cost: scrypt's n, a power of two in [2**10, 2**18].
        recipients: Public keys, at most 256. Who they are does not show in the file; how many, does.

    Returns:
        JSON, ASCII.

    Raises:
        ConfigError: The passphrase is empty, the cost out of range, a recipient no usable X25519 public key,
            there are too many of them, or neither passphrase nor recipient.
    """
    if passphrase == "" or (passphrase is None and not recipients):
        raise ConfigError(
            "a key must be sealed with a passphrase of at least one character, or for a recipient's public "
            "key; got neither"
        )
    if not _is_cost(cost):
        raise ConfigError(f"expected a power of two in [2**10, 2**18] as scrypt cost, got {cost!r}")
    file_key = AESGCM.generate_key(256)
    nonce = os.urandom(12)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "cipher": "AES-256-GCM",
        "passphrase": None if passphrase is None else _wrap(file_key, passphrase, cost),
        "recipients": [wrapped.hex() for wrapped in wrap(file_key, recipients)],
        "nonce": nonce.hex(),
    }
    return _canonical(header | {"sealed": AESGCM(file_key).encrypt(nonce, content, _canonical(header)).hex()})


def unlock(data: bytes, passphrase: str | None = None, *, identity: X25519PrivateKey | None = None) -> bytes:
    """Open what `lock` sealed, with either of the two.

    Raises:
        KeyFileError: Another passphrase, an identity it was not sealed for, or the data is cut, altered, or
            of another format.
        ConfigError: Neither a passphrase nor an identity is given.
    """
    if passphrase is None and identity is None:
        raise ConfigError(
            "a sealed key opens with its passphrase or with a recipient's private key; give one"
        )
    document = _document(data)
    # Whatever parses to the same values (other spaces, another order) is an altered file all the same.
    if _canonical(document) != data:
        raise _altered()
    if set(document) != _FIELDS or document["cipher"] != "AES-256-GCM":
        raise _altered()
    nonce, sealed = _unhex(document, "nonce", 12), _unhex(document, "sealed")
    file_key = _file_key(document, passphrase, identity)
    header = {field: value for field, value in document.items() if field != "sealed"}
    try:
        return AESGCM(file_key).decrypt(nonce, sealed, _canonical(header))
    except InvalidTag:
        raise _altered() from None


def takes_passphrase(data: bytes) -> bool:
    """Whether a sealed key can be opened with a passphrase.

    Raises:
        KeyFileError: It is no sealed key.
    """
    return _document(data).get("passphrase") is not None


def _file_key(document: dict[str, Any], passphrase: str | None, identity: X25519PrivateKey | None) -> bytes:
    stanza, recipients = document["passphrase"], document["recipients"]
    if not isinstance(recipients, list) or len(recipients) > MAX_RECIPIENTS or not (stanza or recipients):
        raise _altered()
    wrapped = [_unhex({"recipients": text}, "recipients", WRAPPED) for text in recipients]
    if stanza is not None:
        _check_stanza(stanza)
    if identity is not None and (found := unwrap(wrapped, identity)) is not None:
        return found
    if passphrase is None:
        raise KeyFileError(
            "the key was not sealed for this private key, or the file was altered; give the private key of "
            f"one of its {len(wrapped)} recipients, or the passphrase"
            if wrapped
            else "the key was sealed with a passphrase and for no recipient; give the passphrase"
        )
    if stanza is None:
        raise KeyFileError(ONLY_RECIPIENTS)
    try:
        return _unwrap(stanza, passphrase)
    except InvalidTag:
        raise _wrong_passphrase() from None


def _wrap(file_key: bytes, passphrase: str, cost: int) -> dict[str, Any]:
    salt, nonce = os.urandom(16), os.urandom(12)
    stanza = _KDF | {"n": cost, "salt": salt.hex(), "nonce": nonce.hex()}
    wrapped = AESGCM(_stretch(passphrase, salt, cost)).encrypt(nonce, file_key, _canonical(stanza))
    return stanza | {"wrapped": wrapped.hex()}


def _check_stanza(stanza: Any) -> None:
    if not isinstance(stanza, dict) or set(stanza) != {*_KDF, "nonce", "wrapped"} or not _is_kdf(stanza):
        raise _altered()
    for field, size in (("salt", 16), ("nonce", 12), ("wrapped", 48)):
        _unhex(stanza, field, size)


def _unwrap(stanza: dict[str, Any], passphrase: str) -> bytes:
    salt, nonce, wrapped = (bytes.fromhex(stanza[field]) for field in ("salt", "nonce", "wrapped"))
    rest = {field: value for field, value in stanza.items() if field != "wrapped"}
    return AESGCM(_stretch(passphrase, salt, stanza["n"])).decrypt(nonce, wrapped, _canonical(rest))


def _document(data: bytes) -> dict[str, Any]:
    try:
        sane = all(data.count(mark) <= most for mark, most in _MOST.items())
        document = json.loads(data.decode("ascii")) if sane else None
    except (ValueError, RecursionError):
        raise KeyFileError(
            f"expected a sealed key, got something cut or of another format; {_REMEDY}"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise KeyFileError(f"expected a file of format {FORMAT!r}; give the path of a key that deepenc saved")
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise KeyFileError(f"the key file's version {str(version)[:20]!r} is no version; {_REMEDY}")
    if version > VERSION:
        raise KeyFileError(
            f"the key file has version {str(version)[:20]}, this deepenc reads {VERSION}; install a newer "
            "deepenc"
        )
    return document


def _unhex(document: dict[str, Any], field: str, size: int | None = None) -> bytes:
    try:
        found = bytes.fromhex(document[field])
        if found.hex() == document[field] and size in (None, len(found)):  # capital digits are altered, too
            return found
    except (TypeError, ValueError):
        pass
    raise KeyFileError(f"the key file's field {field!r} was altered; {_REMEDY}")


def _is_cost(n: object) -> bool:
    return type(n) is int and n in _COSTS and n & (n - 1) == 0


def _is_kdf(stanza: dict[str, Any]) -> bool:
    return _is_cost(stanza["n"]) and all(stanza[field] == _KDF[field] for field in ("kdf", "r", "p"))


def _altered() -> KeyFileError:
    return KeyFileError(f"the key file was altered; {_REMEDY}")


def _wrong_passphrase() -> KeyFileError:
    return KeyFileError(f"wrong passphrase, or the key file was altered; check the passphrase, or {_REMEDY}")


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def _stretch(passphrase: str, salt: bytes, n: int) -> bytes:
    # One passphrase may reach us in several Unicode spellings, depending on the keyboard.
    spelled = unicodedata.normalize("NFKC", passphrase).encode("utf-8", "surrogatepass")
    try:
        return Scrypt(salt=salt, length=32, n=n, r=8, p=1).derive(spelled)
    except MemoryError:
        raise KeyFileError(f"the passphrase needs {n // 2**10} MiB of free memory to open the key") from None
