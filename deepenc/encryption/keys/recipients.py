"""Recipients of a sealed key: X25519 key pairs in PEM files, and wrapping for them by HPKE (RFC 9180)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from deepenc.errors import ConfigError, KeyFileError
from deepenc.files import read_file

MAX_RECIPIENTS = 256
WRAPPED = 80
"""Bytes that the file key takes for each recipient: an ephemeral public key, 32 sealed bytes, a tag."""

_MAX_PEM = 2**16
_INFO = b"deepenc-key 1"
_MAKE = "make one with `openssl genpkey -algorithm X25519 -out owner.pem`"
_PUBLIC = "`openssl pkey -in owner.pem -pubout -out owner.pub.pem`"


def wrap(file_key: bytes, recipients: Sequence[X25519PublicKey]) -> list[bytes]:
    """Wrap a file key for each recipient.

    Args:
        file_key: 32 bytes.
        recipients: Their public keys, at most 256.

    Returns:
        80 bytes for each, in order.

    Raises:
        ConfigError: Too many recipients, or one that is no usable X25519 public key.
    """
    if len(recipients) > MAX_RECIPIENTS:
        raise ConfigError(
            f"expected at most {MAX_RECIPIENTS} recipients, got {len(recipients)}; seal several files"
        )
    result = []
    for recipient in recipients:
        if not isinstance(recipient, X25519PublicKey):
            raise ConfigError(
                f"expected X25519 public keys as recipients, got {type(recipient).__name__}; read them with "
                "`deepenc.encryption.keys.recipients.read_recipient`"
            )
        try:
            result.append(_suite().encrypt(file_key, recipient, _INFO))
        except ValueError:  # a point of low order: everybody knows the secret shared with it
            raise ConfigError(
                f"a recipient's public key is one that anybody can open; ask for another: {_MAKE}"
            ) from None
    return result


def unwrap(wrapped: Sequence[bytes], identity: X25519PrivateKey) -> bytes | None:
    """The file key, where one of these was wrapped for a private key; else None.

    An ephemeral key of low order, whose shared secret would be zero, opens nothing.

    Args:
        wrapped: From `wrap`.
        identity: The private key.

    Raises:
        ConfigError: The identity is no X25519 private key.
    """
    if not isinstance(identity, X25519PrivateKey):
        raise ConfigError(
            f"expected an X25519 private key as identity, got {type(identity).__name__}; read it with "
            "`deepenc.encryption.keys.recipients.read_identity`"
        )
    for entry in wrapped:
        try:
            found = _suite().decrypt(entry, identity, _INFO)
        except (InvalidTag, ValueError):
            continue
        if len(found) == 32:
            return found
    return None


def read_recipient(path: str | Path) -> X25519PublicKey:
    """Read a public key from a PEM file, as ``openssl pkey -pubout`` writes it.

    Raises:
        KeyFileError: The file cannot be read, or holds something else.
    """
    data = _read(path)
    if b"PRIVATE KEY-----" in data:
        raise KeyFileError(
            f"{path} holds a private key: keep it secret, and give its public half, from {_PUBLIC}"
        )
    try:
        found = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise _no_key(path, data, "public", _PUBLIC) from None
    if not isinstance(found, X25519PublicKey):
        raise _other(path, found)
    return found


def is_encrypted(path: str | Path) -> bool:
    """Whether a PEM file's private key needs a passphrase.

    Raises:
        KeyFileError: The file cannot be read.
    """
    return any(mark in _read(path) for mark in (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED"))


def read_identity(path: str | Path, passphrase: str | None = None) -> X25519PrivateKey:
    """Read a private key from a PEM file, as ``openssl genpkey -algorithm X25519`` writes it.

    Args:
        path: The file.
        passphrase: Where the file is encrypted; see `is_encrypted`.

    Raises:
        KeyFileError: The file cannot be read, holds something else, or needs another passphrase.
    """
    data = _read(path)
    if b"PUBLIC KEY-----" in data:
        raise KeyFileError(f"{path} holds a public key, which opens nothing; give the private key")
    encrypted = is_encrypted(path)
    if encrypted and not passphrase:
        raise KeyFileError(f"{path} is encrypted; give the private key's passphrase")
    password = passphrase.encode() if encrypted and passphrase else None
    try:
        found = load_pem_private_key(data, password)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise KeyFileError(f"wrong passphrase for {path}, or the file is damaged") from None
        raise _no_key(path, data, "private", _MAKE) from None
    if not isinstance(found, X25519PrivateKey):
        raise _other(path, found)
    return found


def _suite() -> Suite:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _read(path: str | Path) -> bytes:
    try:
        return read_file(path, _MAX_PEM)
    except OSError as error:
        raise KeyFileError(f"cannot read a key from {path}: {error.strerror}; give a PEM file") from error


def _other(path: str | Path, found: object) -> KeyFileError:
    kind = type(found).__name__.removeprefix("_")
    return KeyFileError(f"{path}: expected an X25519 key, got {kind}; {_MAKE}")


def _no_key(path: str | Path, data: bytes, half: str, remedy: str) -> KeyFileError:
    labels = ", ".join(sorted(set(_labels(data)))[:3])
    got = f"one that holds {labels}" if labels else "no PEM at all"
    return KeyFileError(f"expected a PEM file with an X25519 {half} key in {path}, got {got}; {remedy}")


def _labels(data: bytes) -> Iterator[str]:
    for line in data.splitlines():
        if line.startswith(b"-----BEGIN ") and line.endswith(b"-----"):
            yield repr(line[11:-5].decode("ascii", "replace")[:40])
