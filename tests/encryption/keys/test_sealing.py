from __future__ import annotations

import functools
import json
import os
import stat
from pathlib import Path

import pytest

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
        with pytest.raises(KeyFileError, match=r"other sites.*deepenc\.load\(folder\)\.sites"):
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
