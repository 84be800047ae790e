"""The key: where the confusion channels are, as positions, as integers, and on disk."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import comb, log2
from pathlib import Path
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.ranks import rank, unrank
from deepenc.encryption.keys.sealing import COST, lock, unlock
from deepenc.errors import ConfigError, KeyFileError, SiteError
from deepenc.files import read_file, write_whole
from deepenc.network.arrangement import Arrangement
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout

_MAX_FILE = 2**24  # a key takes a few bytes a site, and what it withholds; nobody's is larger than this
_MAX_CHANNELS = 2**18  # of one site, confusion channels included: unranking takes their number squared


@dataclass(frozen=True, repr=False)
class Key:
    """Where the confusion channels of one encrypted network are (Section 2.2).

    Attributes:
        sites: The victim's sites.
        positions: Site name -> ascending positions among all channels of the encrypted site; only sites
            that have confusion channels. Kept out of the repr, as all that is secret.
        fingerprint: Of the encrypted tensors; see `fingerprint`.
        arrangement: How the victim's own channels were ordered and scaled before insertion.
        withheld: Tensors of the victim that the release replaces by others, in the safetensors format; empty
            where there are none.
        binding: 32 secret bytes that sign the header of its release; empty where the key was made from
            integers, which sign nothing.

    Raises:
        SiteError: Positions or an arrangement that do not fit the sites, or two sites of one name.
    """

    sites: tuple[Site, ...]
    positions: Mapping[str, tuple[int, ...]]
    fingerprint: str
    arrangement: Arrangement = field(default_factory=Arrangement)
    withheld: bytes = b""
    binding: bytes = b""

    def __repr__(self) -> str:
        return (
            f"Key({sum(self.allocation.values())} confusion channels at {len(self.positions)} of "
            f"{len(self.sites)} sites, {self.entropy:.1f} bits, of the network {self.fingerprint[:12]})"
        )

    def __post_init__(self) -> None:
        check_sites(self.sites)
        self.layout()
        self.arrangement.check(self.sites)

    @classmethod
    def from_ranks(
        cls,
        sites: Sequence[Site],
        allocation: Mapping[str, int],
        ranks: Mapping[str, int],
        fingerprint: str,
    ) -> Self:
        """Make the key from its integers; the inverse of `ranks`.

        Args:
            sites: The victim's sites.
            allocation: Confusion channels per site; sites not named have none.
            ranks: A rank for each site that has confusion channels.
            fingerprint: Of the encrypted tensors.

        Raises:
            SiteError: A site that the network does not have, or a channel count below 0.
            ConfigError: A number that is no rank, or one that is missing.
        """
        widths = {site.name: site.width for site in sites}
        counts = {name: count for name, count in allocation.items() if count}
        if set(counts) != set(ranks):
            raise ConfigError(f"expected ranks of the sites {sorted(counts)}, got {sorted(ranks)}")
        if wrong := sorted(name for name, count in counts.items() if name not in widths or count < 0):
            raise SiteError(f"the network has no sites {wrong[:5]} to which the key could belong")
        positions = {name: unrank(ranks[name], widths[name] + count, count) for name, count in counts.items()}
        return cls(tuple(sites), positions, fingerprint)

    def sign(self, contents: str) -> str:
        """A signature (HMAC-SHA256) that only this key can make; empty from a key made from integers."""
        return hmac.digest(self.binding, contents.encode(), "sha256").hex() if self.binding else ""

    def layout(self) -> Layout:
        """Where the victim's entries lie in the encrypted tensors."""
        return Layout(self.sites, self.positions)

    def restored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What else the victim has otherwise than the release, once the confusion channels are out.

        Args:
            tensors: The tensors without confusion channels, by name.

        Returns:
            Those that change: channels back in their places and sizes, and what was withheld.

        Raises:
            KeyFileError: What was withheld is not of these tensors.
        """
        changed = self.arrangement.undo(tensors, self.sites)
        for name, tensor in self.withheld_tensors().items():
            own = tensors.get(name)
            if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
                raise KeyFileError(f"the key withholds {name!r}, which the network does not have like that")
            changed[name] = tensor.to(own.device)
        return changed

    def withheld_tensors(self) -> dict[str, Tensor]:
        """The victim's tensors that the release replaces, by name."""
        return load(self.withheld) if self.withheld else {}

    @property
    def allocation(self) -> dict[str, int]:
        """Confusion channels of every site, the paper's ΔC; 0 where there are none."""
        return {site.name: len(self.positions.get(site.name, ())) for site in self.sites}

    @property
    def bits(self) -> dict[str, float]:
        """Entropy of every site's positions: ``log2 comb(C + ΔC, ΔC)``."""
        return {
            site.name: log2(comb(site.width + count, count))
            for site, count in zip(self.sites, self.allocation.values(), strict=True)
        }

    @property
    def entropy(self) -> float:
        """Entropy of the whole key in bits, given the allocation."""
        return sum(self.bits.values())

    def ranks(self) -> dict[str, int]:
        """The key as one integer per site that has confusion channels (see `keys.ranks`)."""
        widths = {site.name: site.width for site in self.sites}
        return {name: rank(p, widths[name] + len(p)) for name, p in self.positions.items() if p}


def check_sites(sites: Sequence[Site]) -> None:
    """Raise SiteError where two sites have one name."""
    names = Counter(site.name for site in sites)
    if twice := sorted(name for name, number in names.items() if number > 1):
        raise SiteError(f"the names of sites must be unique, got twice: {twice[:5]}")


def verify(tensors: Mapping[str, Tensor], key: Key) -> None:
    """Check that a key belongs to these encrypted tensors.

    Raises:
        KeyFileError: It belongs to others.
    """
    _check_network(expect_key(key), fingerprint(tensors))


def expect_key(key: object) -> Key:
    """The key, if it is one.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(key, Key):
        raise ConfigError(f"expected a Key, got {type(key).__name__}; `deepenc.load_key` reads one")
    return key


def _check_network(key: Key, found: str) -> None:
    if found != key.fingerprint:
        raise KeyFileError(
            f"the key is for the encrypted network {key.fingerprint[:12]}, this one is {found[:12]}: it is "
            "another network or key, or a tensor was changed since; use the key that was made with this "
            "very network"
        )


class ReleasedSites(tuple[Site, ...]):
    """Sites as a release states them; they remember its header, so that the key is checked against that, too.

    Attributes:
        fingerprint: Of the release's tensors.
        contents: Digest of what its header says.
        seal: The header's signature, from `Key.sign`.
    """

    fingerprint: str
    contents: str
    seal: str

    @classmethod
    def of(cls, sites: Sequence[Site], fingerprint: str, contents: str, seal: str) -> Self:
        """Sites with what is known of the release."""
        found = cls(sites)
        found.fingerprint, found.contents, found.seal = fingerprint, contents, seal
        return found

    def check(self, key: Key) -> None:
        """Raise KeyFileError where a key was not made for this release, or its header was altered since."""
        _check_network(key, self.fingerprint)
        if not hmac.compare_digest(self.seal, key.sign(self.contents)):
            raise KeyFileError(
                "the network's header (deepenc.json) is not the one that was saved with this key: it was "
                "altered; restore the folder from its original"
            )


class _Content(BaseModel):
    """What is sealed. Anybody can seal for a public key, so that it is not to be trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ranks: dict[str, tuple[Annotated[int, Field(ge=1)], Annotated[str, Field(pattern="^[0-9a-f]+$")]]]
    sites: str
    fingerprint: str
    order: dict[str, tuple[int, ...]]
    powers: dict[str, tuple[int, ...]]
    withheld: str
    binding: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]


def seal(
    key: Key,
    passphrase: str | None = None,
    cost: int = COST,
    *,
    recipients: Sequence[X25519PublicKey] = (),
) -> bytes:
    """Seal a key with a passphrase, for recipients, or both; the sites stay with the encrypted network.

    Args:
        key: The key.
        passphrase: Not empty; None for recipients only.
        cost: scrypt's n, a power of two in [2**10, 2**18].
        recipients: X25519 public keys, at most 256; the owner of any of them opens the key alone.

    Raises:
        ConfigError: Neither a passphrase nor a recipient, or one that is unusable; the cost is out of range;
            a site has more than 2**18 channels.
    """
    for site in key.sites:
        if (total := site.width + len(key.positions.get(site.name, ()))) > _MAX_CHANNELS:
            raise ConfigError(
                f"a sealed key takes sites of at most {_MAX_CHANNELS} channels, {site.name!r} has {total}; "
                "keep the secret instead"
            )
    return lock(_content(key), passphrase, cost, recipients=recipients)


def secret_bytes(key: Key) -> int:
    """Bytes that an owner keeps for one release: what is sealed, without what is of fixed length.

    Positions, order and sizes of the victim's own channels, and all that is withheld; not the digests, which
    tell whose key it is, nor what the sealing adds.
    """
    fixed = replace(key, positions={}, arrangement=Arrangement(), withheld=b"")
    return len(_content(key)) - len(_content(fixed))


def _content(key: Key) -> bytes:
    content = {
        "ranks": {name: [len(key.positions[name]), f"{number:x}"] for name, number in key.ranks().items()},
        "sites": _sites_digest(key.sites),
        "fingerprint": key.fingerprint,
        "order": dict(key.arrangement.order),
        "powers": dict(key.arrangement.powers),
        "withheld": b64encode(key.withheld).decode(),
        "binding": key.binding.hex(),
    }
    return json.dumps(content, separators=(",", ":")).encode()


def unseal(
    data: bytes,
    passphrase: str | None = None,
    sites: Sequence[Site] = (),
    *,
    identity: X25519PrivateKey | None = None,
) -> Key:
    """Open a sealed key, with its passphrase or with a recipient's private key.

    Args:
        data: From `seal`.
        passphrase: The one it was sealed with.
        sites: The victim's sites. Those of a `Checkpoint` know its header, and it is checked that the key was
            saved with this very one.
        identity: The private key of one of its recipients; tried first where both are given.

    Raises:
        KeyFileError: Another passphrase or private key, sites or a header of another network, or the data is
            cut, altered, of another format or from a newer version.
        ConfigError: Neither a passphrase nor a private key is given.
    """
    opened = unlock(data, passphrase, identity=identity)
    try:
        content = _Content.model_validate_json(opened)
    except ValidationError:
        raise KeyFileError(
            "the key file opens, but holds no key of deepenc's; ask whoever sealed it for another"
        ) from None
    if content.sites != _sites_digest(sites):
        raise KeyFileError(
            f"the key was made for other sites than {'these' if sites else 'none'}; open it with those of "
            "its own network: sites=deepenc.load(folder).sites"
        )
    counts = {name: count for name, (count, _) in content.ranks.items()}
    ranks = {name: int(number, 16) for name, (_, number) in content.ranks.items()}
    totals = {site.name: site.width + counts[site.name] for site in sites if site.name in counts}
    if set(totals) == set(counts) and all(
        total <= _MAX_CHANNELS and ranks[name] < comb(total, counts[name]) for name, total in totals.items()
    ):
        with suppress(SiteError, ValueError, SafetensorError):
            arrangement = Arrangement(content.order, content.powers)
            withheld = b64decode(content.withheld, validate=True)
            if withheld:
                load(withheld)
            plain = Key.from_ranks(sites, counts, ranks, content.fingerprint)
            binding = bytes.fromhex(content.binding)
            key = replace(plain, arrangement=arrangement, withheld=withheld, binding=binding)
            if isinstance(sites, ReleasedSites):
                sites.check(key)
            return key
    raise KeyFileError(
        "the key file opens, but what it holds does not fit the sites; ask whoever sealed it for another"
    )


def _sites_digest(sites: Sequence[Site]) -> str:
    # Without it, altered sites beside unaltered tensors would turn the right key into a wrong network.
    plain = [asdict(site) for site in sites]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def save_key(
    key: Key,
    path: str | Path,
    passphrase: str | None = None,
    cost: int = COST,
    *,
    recipients: Sequence[X25519PublicKey] = (),
) -> None:
    """Seal a key, as `seal` does, and write it to a file that only its owner can read; all of it or nothing.

    Raises:
        KeyFileError: The file cannot be written.
        ConfigError: It cannot be sealed.
    """
    data = seal(key, passphrase, cost, recipients=recipients)
    try:
        write_whole(Path(path), data, private=True)
    except OSError as error:
        raise KeyFileError(
            f"cannot write the key to {path}: {error.strerror}; give a path in a writable folder"
        ) from error


def load_key(
    path: str | Path,
    passphrase: str | None = None,
    sites: Sequence[Site] = (),
    *,
    identity: X25519PrivateKey | None = None,
) -> Key:
    """Read a key that `save_key` wrote, and open it as `unseal` does.

    Raises:
        KeyFileError: No such file, another passphrase or private key, sites or a header of another network,
            or the file is cut, altered, of another format or from a newer version.
        ConfigError: Neither a passphrase nor a private key is given.
    """
    return unseal(read_key(path), passphrase, sites, identity=identity)


def read_key(path: str | Path) -> bytes:
    """Read a sealed key, and leave it sealed.

    Raises:
        KeyFileError: It cannot be read, or is too large for a key.
    """
    try:
        return read_file(path, _MAX_FILE)
    except OSError as error:
        raise KeyFileError(
            f"cannot read a key from {path}: {error.strerror}; give the path of a saved key"
        ) from error
