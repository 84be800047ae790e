from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deepenc.encryption.keys import sealing
from deepenc.encryption.keys.key import Key, load_key, save_key, seal, unseal
from deepenc.errors import ConfigError, DeepencError, KeyFileError
from deepenc.network.sites import Role, Site, Slot

SITES = (
    Site("a", 4, (Slot("a.weight", 0, Role.INCOMING), Slot("b.weight", 1, Role.OUTGOING))),
    Site("b", 300, (Slot("b.weight", 0, Role.INCOMING), Slot("c.weight", 1, Role.OUTGOING))),
)
KEY = Key(SITES, {"a": (0, 5), "b": tuple(range(3, 250, 2))}, "f" * 64)
CHEAP = 2**10
FIRST = (
    b'{"format":"deepenc-key","version":1,"kdf":"scrypt","n":1024,"r":8,"p":1,"salt":"d6c1e918fcc5f0751cbce45dd82b9aba",'
    b'"cipher":"AES-256-GCM","nonce":"95e5fef69f347ee2a00cf7b7","sealed":"'
    b"aa4e738ab8319ec34a04d11d56cce18be2f5c7568d8f96be8d7d0173884c147beedb7aa7ed025615764435ca4d773469"
    b"df9c43d4e0274be62891fb7d24fc120aa252ec01f502bc2656c45f630d48f5e82f8a75f663f57d18dbf1843cb7844395"
    b"c0abaf84469c67dd380647c08c77ab94fdd9e7e99cb9ac550a47fdd781b80873a9931cd26ae32d248b3163d9839098ce"
    b"4ed8a6648d05fa2d79ed180ae526d501ea28556432299d50b6f714601ca846a61d66c3dddfee14211f543d3787c95383"
    b"34cbbb686c889e4b68c3"
    b'"}'
)
"""A key file as version 0.1 wrote it, before sites had `contracted` and `settings`."""


def test_sealed_key_opens_again_and_tells_nothing() -> None:
    data = seal(KEY, "päss", CHEAP)
    assert unseal(data, "päss", SITES) == KEY
    assert unseal(data, "pa\u0308ss", SITES) == KEY  # the same letters, typed on another keyboard
    assert b"rank" not in data and data != seal(KEY, "päss", CHEAP)
    assert len(data) < 1000


def test_wrong_passphrase() -> None:
    with pytest.raises(KeyFileError, match="passphrase"):
        unseal(seal(KEY, "right", CHEAP), "wrong", SITES)
    with pytest.raises(KeyFileError, match="passphrase"):
        unseal(seal(KEY, "right", CHEAP), "", SITES)


def test_sites_of_another_network() -> None:
    data = seal(KEY, "p", CHEAP)
    wider = (Site("a", 5, SITES[0].slots), SITES[1])
    for sites in (SITES[:1], SITES[::-1], wider, ()):
        with pytest.raises(KeyFileError, match="other sites"):
            unseal(data, "p", sites)


def test_every_flipped_bit_and_every_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_stretch", functools.cache(sealing._stretch))
    data = seal(Key(SITES[:1], {"a": (1,)}, ""), "p", CHEAP)
    for place in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[place] ^= 1 << bit
            with pytest.raises(KeyFileError):
                unseal(bytes(altered), "p", SITES[:1])
        with pytest.raises(KeyFileError):
            unseal(data[:place], "p", SITES[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "newer deepenc"),
        ({"version": True}, "version"),
        ({"format": "other"}, "format"),
        ({"passphrase": {"n": 2**40}}, "altered"),
        ({"passphrase": {"n": 1000}}, "altered"),
        ({"passphrase": {"n": 2**11}}, "altered"),  # in bounds, but not what was authenticated
        ({"passphrase": {"r": 2**20}}, "altered"),
        ({"passphrase": {"p": 2**20}}, "altered"),
        ({"passphrase": {"kdf": "none"}}, "altered"),
        ({"passphrase": {"salt": ""}}, "altered"),
        ({"passphrase": {"wrapped": ""}}, "altered"),
        ({"passphrase": {"more": 1}}, "altered"),
        ({"passphrase": 3}, "altered"),
        ({"passphrase": None}, "altered"),
        ({"recipients": None}, "altered"),
        ({"recipients": ["00" * 80]}, "altered"),  # the header is bound to the contents
        ({"recipients": ["00"]}, "altered"),
        ({"recipients": [3]}, "altered"),
        ({"recipients": ["00" * 80] * 257}, "altered"),
        ({"recipients": ["00" * 80] * 10_000}, "format"),
        ({"cipher": "none"}, "altered"),
        ({"nonce": 3}, "altered"),
        ({"sealed": ""}, "altered"),
        ({"more": 1}, "altered"),
    ],
)
def test_forged_headers(change: dict[str, object], message: str) -> None:
    document = json.loads(seal(KEY, "p", CHEAP))
    if isinstance(stanza := change.get("passphrase"), dict):
        change = change | {"passphrase": document["passphrase"] | stanza}
    document |= change
    with pytest.raises(KeyFileError, match=message):
        unseal(sealing._canonical(document), "p", SITES)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2**40},
        {"n": 2**11},
        {"r": 9},
        {"kdf": "none"},
        {"salt": ""},
        {"nonce": 3},
        {"sealed": ""},
        {"more": 1},
    ],
)
def test_files_of_version_1_open_still_and_only_unchanged(change: dict[str, object]) -> None:
    assert unseal(FIRST, "p", SITES[:1]) == Key(SITES[:1], {"a": (0, 5)}, "f" * 64)
    with pytest.raises(KeyFileError, match="passphrase"):
        unseal(FIRST, "q", SITES[:1])
    with pytest.raises(KeyFileError, match="passphrase"):
        unseal(FIRST, None, SITES[:1], identity=X25519PrivateKey.generate())
    with pytest.raises(KeyFileError, match="altered"):
        unseal(sealing._canonical(json.loads(FIRST) | change), "p", SITES[:1])


def test_another_spelling_of_the_same_values_is_an_altered_file_too() -> None:
    data = seal(KEY, "p", CHEAP)
    document = json.loads(data)
    for altered in (data + b"\n", json.dumps(document).encode(), data.replace(b'"r":8', b'"r":8.0')):
        with pytest.raises(KeyFileError, match="altered"):
            unseal(altered, "p", SITES)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b"12"])
def test_what_is_no_key_at_all(data: bytes) -> None:
    with pytest.raises(KeyFileError, match="format"):
        unseal(data, "p", SITES)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "my.key"
    save_key(KEY, path, "p", CHEAP)
    assert load_key(path, "p", SITES) == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["my.key"]


def test_key_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="saved key"):
        load_key(tmp_path / "none", "p", SITES)
    with pytest.raises(KeyFileError, match="cannot read"):
        load_key(tmp_path, "p", SITES)
    with pytest.raises(KeyFileError, match="writable"):
        save_key(KEY, tmp_path / "no" / "folder", "p", CHEAP)
    with pytest.raises(KeyFileError, match="writable"):
        save_key(KEY, tmp_path, "p", CHEAP)
    assert os.listdir(tmp_path) == []
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**25)
    with pytest.raises(KeyFileError, match="too large"):
        load_key(tmp_path / "large", "p", SITES)


def test_sealing_needs_a_passphrase_and_a_sane_cost() -> None:
    with pytest.raises(ConfigError, match="passphrase"):
        seal(KEY, "")
    for cost in (0, 1000, 2**30, True):
        with pytest.raises(DeepencError, match="cost"):
            seal(KEY, "p", cost)
