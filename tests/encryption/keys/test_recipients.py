from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from torch import Tensor, nn

from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys import sealing
from deepenc.encryption.keys.key import Key, load_key, save_key, seal, unseal
from deepenc.encryption.keys.recipients import MAX_RECIPIENTS, is_encrypted, read_identity, read_recipient
from deepenc.errors import ConfigError, KeyFileError
from deepenc.network.sites import Role, Site, Slot

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
SITES = (Site("a", 40, (Slot("a.weight", 0, Role.INCOMING), Slot("b.weight", 1, Role.OUTGOING))),)
KEY = Key(SITES, {"a": (0, 5)}, "f" * 64)
CHEAP = 2**10
DEFENSE = {"base": "paper-init", "name": "test", "placement": "absolute:count=2"}
ALICE, BOB, EVE = (X25519PrivateKey.generate() for _ in range(3))
# Points of order 1, 2 (as 0) and 8, from RFC 7748 and the list of small-order points of Curve25519.
LOW = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
]


def test_any_recipient_and_the_passphrase_open_it_and_nobody_else() -> None:
    data = seal(KEY, "p", CHEAP, recipients=[ALICE.public_key(), BOB.public_key()])
    for opened in (
        unseal(data, "p", SITES),
        unseal(data, sites=SITES, identity=ALICE),
        unseal(data, sites=SITES, identity=BOB),
        unseal(data, "wrong", SITES, identity=BOB),
        unseal(data, "p", SITES, identity=EVE),
    ):
        assert opened == KEY
    with pytest.raises(KeyFileError, match="one of its 2 recipients"):
        unseal(data, sites=SITES, identity=EVE)
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        unseal(data, "wrong", SITES, identity=EVE)
    with pytest.raises(ConfigError, match="give one"):
        unseal(data, sites=SITES)


def test_without_a_passphrase_none_opens_it() -> None:
    data = seal(KEY, recipients=[ALICE.public_key()])
    assert unseal(data, sites=SITES, identity=ALICE) == KEY
    with pytest.raises(KeyFileError, match="recipients only"):
        unseal(data, "p", SITES)
    with pytest.raises(KeyFileError, match="for no recipient"):
        unseal(seal(KEY, "p", CHEAP), sites=SITES, identity=ALICE)


def test_a_file_does_not_tell_whom_it_is_for() -> None:
    public = ALICE.public_key().public_bytes_raw().hex()
    first, second = (json.loads(seal(KEY, recipients=[ALICE.public_key()])) for _ in range(2))
    assert public not in json.dumps(first)
    assert not set(first["recipients"]) & set(second["recipients"])


def test_what_cannot_be_sealed() -> None:
    with pytest.raises(ConfigError, match="got neither"):
        seal(KEY)
    with pytest.raises(ConfigError, match="passphrase"):
        seal(KEY, "", CHEAP, recipients=[ALICE.public_key()])
    with pytest.raises(ConfigError, match="X25519 public keys"):
        seal(KEY, recipients=[ALICE])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="X25519 private key"):
        unseal(seal(KEY, recipients=[ALICE.public_key()]), sites=SITES, identity=ALICE.public_key())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"at most {MAX_RECIPIENTS}"):
        seal(KEY, recipients=[ALICE.public_key()] * (MAX_RECIPIENTS + 1))
    wide = Site("a", 2**18, SITES[0].slots)
    with pytest.raises(ConfigError, match="at most 262144"):
        seal(Key((wide,), {"a": (0,)}, ""), "p", CHEAP)


def test_as_many_recipients_as_a_file_may_have() -> None:
    data = seal(KEY, recipients=[EVE.public_key()] * (MAX_RECIPIENTS - 1) + [ALICE.public_key()])
    assert unseal(data, sites=SITES, identity=ALICE) == KEY


@pytest.mark.parametrize("point", LOW)
def test_points_of_low_order_open_nothing(point: bytes) -> None:
    with pytest.raises(ConfigError, match="anybody can open"):
        seal(KEY, recipients=[X25519PublicKey.from_public_bytes(point)])
    document = json.loads(seal(KEY, recipients=[ALICE.public_key()]))
    document["recipients"][0] = point.hex() + document["recipients"][0][64:]
    with pytest.raises(KeyFileError):
        unseal(sealing._canonical(document), sites=SITES, identity=ALICE)


def test_a_recipient_taken_out_or_put_in_is_noticed_by_the_others() -> None:
    document = json.loads(seal(KEY, recipients=[ALICE.public_key(), BOB.public_key()]))
    stranger = json.loads(seal(KEY, recipients=[EVE.public_key()]))["recipients"]
    for recipients in (
        document["recipients"][:1],
        document["recipients"][::-1],
        document["recipients"] + stranger,
    ):
        with pytest.raises(KeyFileError, match="altered"):
            unseal(sealing._canonical(document | {"recipients": recipients}), sites=SITES, identity=ALICE)


@pytest.mark.parametrize(
    "ranks",
    [
        {"a": [2, "ffff"]},
        {"a": [2, "f" * 100_000]},
        {"a": [10**9, "0"]},
        {"a": [0, "0"]},
        {"a": [-1, "0"]},
        {"a": [2, "-1"]},
        {"b": [2, "0"]},
        {"a": 3},
        [],
    ],
)
def test_contents_that_a_stranger_sealed(ranks: object) -> None:
    content = json.loads(sealing.unlock(seal(KEY, "p", CHEAP), "p")) | {"ranks": ranks}
    data = sealing.lock(json.dumps(content).encode(), recipients=[ALICE.public_key()])
    with pytest.raises(KeyFileError, match="opens, but"):
        unseal(data, sites=SITES, identity=ALICE)


def test_a_key_for_a_recipient_is_bound_to_its_own_network(two_sites: Net, small: Net) -> None:
    model, inputs, sites = two_sites
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    again, other = encrypt(model, inputs, DEFENSE, seed=1, sites=sites)
    data = seal(key, recipients=[ALICE.public_key()])
    opened = unseal(data, sites=sites, identity=ALICE)
    assert decrypt(encrypted, opened).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(KeyFileError, match="another network or key"):
        decrypt(again, opened)
    with pytest.raises(KeyFileError, match="another network or key"):
        decrypt(encrypted, other)
    with pytest.raises(KeyFileError, match="other sites"):
        unseal(data, sites=small[2], identity=ALICE)


Openssl = Callable[..., Path]


@pytest.fixture
def openssl(tmp_path: Path) -> Openssl:
    """Call openssl; the result is the file that it writes."""

    def call(name: str, *args: str) -> Path:
        done = subprocess.run(
            ["openssl", *args, "-out", name], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return call


def test_key_pairs_as_openssl_makes_them(openssl: Openssl, tmp_path: Path) -> None:
    private = openssl("owner.pem", "genpkey", "-algorithm", "X25519")
    public = openssl("owner.pub.pem", "pkey", "-in", "owner.pem", "-pubout")
    locked = openssl("locked.pem", "pkey", "-in", "owner.pem", "-aes256", "-passout", "pass:secret")
    save_key(KEY, tmp_path / "key", recipients=[read_recipient(public)])
    assert load_key(tmp_path / "key", sites=SITES, identity=read_identity(private)) == KEY
    assert (is_encrypted(private), is_encrypted(locked)) == (False, True)
    assert load_key(tmp_path / "key", sites=SITES, identity=read_identity(locked, "secret")) == KEY
    assert read_identity(private, "not needed").public_key() == read_recipient(public)
    for passphrase in (None, "", "wrong"):
        with pytest.raises(KeyFileError, match="passphrase"):
            read_identity(locked, passphrase)


def test_what_is_no_x25519_key(openssl: Openssl, tmp_path: Path) -> None:
    private = openssl("owner.pem", "genpkey", "-algorithm", "X25519")
    public = openssl("owner.pub.pem", "pkey", "-in", "owner.pem", "-pubout")
    with pytest.raises(KeyFileError, match="private key: keep it secret"):
        read_recipient(private)
    with pytest.raises(KeyFileError, match="public key, which opens nothing"):
        read_identity(public)
    for algorithm, kind in (("RSA", "RSA"), ("ED25519", "Ed25519"), ("X448", "X448")):
        other = openssl(f"{algorithm}.pem", "genpkey", "-algorithm", algorithm)
        half = openssl(f"{algorithm}.pub.pem", "pkey", "-in", f"{algorithm}.pem", "-pubout")
        with pytest.raises(KeyFileError, match=f"X25519 key, got {kind}"):
            read_identity(other)
        with pytest.raises(KeyFileError, match=f"X25519 key, got {kind}"):
            read_recipient(half)
    subject = ("-x509", "-key", "RSA.pem", "-subj", "/CN=owner")
    certificate = openssl("cert.pem", "req", *subject)
    with pytest.raises(KeyFileError, match="'CERTIFICATE'"):
        read_recipient(certificate)
    with pytest.raises(KeyFileError, match="'CERTIFICATE'"):
        read_identity(certificate)
    for data in (b"", b"\xff" * 100, public.read_bytes()[:60], b"-----BEGIN PUBLIC KEY-----\n"):
        (tmp_path / "bad.pem").write_bytes(data)
        with pytest.raises(KeyFileError):
            read_recipient(tmp_path / "bad.pem")
        with pytest.raises(KeyFileError):
            read_identity(tmp_path / "bad.pem")
    (tmp_path / "large.pem").write_bytes(b"x" * 2**17)
    for path in (tmp_path / "large.pem", tmp_path / "none.pem", tmp_path):
        with pytest.raises(KeyFileError, match=r"too large|cannot read"):
            read_recipient(path)
