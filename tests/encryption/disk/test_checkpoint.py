from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from deepenc.encryption.defense import Defense
from deepenc.encryption.disk import checkpoint
from deepenc.encryption.disk.checkpoint import decrypt_tensors, load, save, write_tensors
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys.key import load_key, save_key
from deepenc.errors import CheckpointError, KeyFileError
from deepenc.network.sites import Site

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
DEFENSE = Defense.of({"base": "paper-init", "name": "test", "placement": "absolute:count=2"})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(t, b[n]) and t.dtype == b[n].dtype for n, t in a.items())


@pytest.fixture
def saved(small: Net, tmp_path: Path) -> Path:
    model, inputs, sites = small
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    save(tmp_path / "net", encrypted, key, victim={"name": "mlp"}, defense=DEFENSE.spec())
    return tmp_path / "net"


def test_the_whole_road_over_the_disk(net: Net, tmp_path: Path) -> None:
    model, inputs, sites = net
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    save(tmp_path / "net", encrypted, key, victim=None, defense=DEFENSE.spec())
    save_key(key, tmp_path / "key", "p", cost=2**10)

    read = load(tmp_path / "net")
    assert same(dict(read.tensors), encrypted.state_dict())
    assert (read.sites, read.allocation) == (sites, key.allocation)
    assert (read.fingerprint, read.victim, read.defense) == (key.fingerprint, None, DEFENSE.spec())
    blank = copy.deepcopy(model)
    for tensor in blank.state_dict().values():
        tensor.zero_()
    network = read.network(blank)
    assert torch.equal(network(inputs), encrypted(inputs))
    again = load_key(tmp_path / "key", "p", read.sites)
    assert same(decrypt(network, again).state_dict(), model.state_dict())

    plain = decrypt_tensors(read.tensors, again)
    assert same(plain, model.state_dict())
    write_tensors(tmp_path / "model.safetensors", plain)
    load_model(blank, tmp_path / "model.safetensors")
    assert same(blank.state_dict(), model.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["key", "model.safetensors", "net"]


def test_networks_made_from_a_checkpoint_do_not_share_tensors(saved: Path, small: Net) -> None:
    read = load(saved)
    for tensor in read.network(small[0]).state_dict().values():
        tensor.fill_(3)
    assert same(read.network(small[0]).state_dict(), load_file(saved / "model.safetensors"))


def test_the_folder_does_not_hold_the_positions(saved: Path, small: Net) -> None:
    document = json.loads((saved / "deepenc.json").read_text())
    assert set(document) == {
        *("format", "version", "victim", "factory", "defense", "sites", "allocation"),
        *("fingerprint", "memory", "beside", "seal", "digest"),
    }
    model, inputs, sites = small
    encrypted, _ = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    size = sum(t.numel() for t in model.parameters()) + sum(t.numel() for t in model.buffers())
    more = sum(t.numel() for t in encrypted.state_dict().values()) - size
    # All tensors but one 64-bit counter are of 32 bits.
    assert document["memory"] == pytest.approx(more / (size + 1))


def test_a_cut_or_altered_tensor_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    for cut in (0, 4, 8, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="restore"):
            load(saved)
    for place in range(0, len(data), 7):
        altered = bytearray(data)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(CheckpointError):
            load(saved)


def test_altered_bytes_and_cuts_of_the_header(saved: Path) -> None:
    path = saved / "deepenc.json"
    data = path.read_bytes()
    for place in range(0, len(data.rstrip()), 5):
        path.write_bytes(data[:place])
        with pytest.raises(CheckpointError):
            load(saved)
        if not data[place : place + 1].isspace():
            altered = bytearray(data)
            altered[place] ^= 1
            path.write_bytes(altered)
            with pytest.raises(CheckpointError):
                load(saved)


def forge(folder: Path, **changes: Any) -> None:
    """Change the header as somebody would who knows how its digest is made."""
    path = folder / "deepenc.json"
    document = json.loads(path.read_text()) | changes
    header = checkpoint.Header.model_validate_json(json.dumps(document)).digested()
    path.write_text(header.model_dump_json())


def test_forged_headers(saved: Path) -> None:
    site = json.loads((saved / "deepenc.json").read_text())["sites"][0]
    slot = site["slots"][0]
    backup = (saved / "deepenc.json").read_bytes()
    for changes in (
        {"allocation": {"0": 10**15}},
        {"allocation": {"0": -1}},
        {"allocation": {"0": 3}},
        {"allocation": {}},
        {"allocation": {"0": 2, "1": 0}},
        {"sites": [site, site]},
        {"sites": [site | {"width": 10**15}]},
        {"sites": [site | {"width": 0}]},
        {"sites": [site | {"slots": [slot | {"dim": 5}]}]},
        {"sites": [site | {"slots": [slot | {"dim": -1}]}]},
        {"sites": [site | {"slots": [slot | {"start": -3}]}]},
        {"sites": [site | {"slots": [slot | {"block": 0}]}]},
        {"sites": [site | {"slots": [slot | {"tensor": "no"}]}]},
        {"sites": [site | {"slots": [slot, slot]}]},
        {"fingerprint": "0" * 64},
    ):
        (saved / "deepenc.json").write_bytes(backup)
        forge(saved, **changes)
        with pytest.raises(CheckpointError):
            load(saved)
    (saved / "deepenc.json").write_bytes(backup)
    load(saved)


def test_forged_sites_beside_true_tensors_do_not_make_a_wrong_network(saved: Path, small: Net) -> None:
    model, inputs, sites = small
    _, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    save_key(key, saved / "key", "p", cost=2**10)
    document = json.loads((saved / "deepenc.json").read_text())["sites"][0]
    forge(saved, sites=[document | {"slots": document["slots"][::-1]}])
    with pytest.raises(KeyFileError, match="other sites"):
        load_key(saved / "key", "p", load(saved).sites)


def test_a_header_belongs_to_its_key(saved: Path, small: Net) -> None:
    """Whatever a forged header says, its digest made to fit, the key does not open the network with it."""
    model, inputs, sites = small
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    save_key(key, saved / "key", "p", cost=2**10)
    assert load_key(saved / "key", "p", load(saved).sites) == key
    true = (saved / "deepenc.json").read_bytes()
    for changes in (
        {"victim": {"name": "network", "config": "/etc/passwd"}},
        {"victim": None},
        {"defense": DEFENSE.spec() | {"weights": {"name": "samp"}}},
        {"factory": "torchvision:resnet18"},
        {"memory": 0.5},
        {"seal": ""},
        {"seal": "0" * 64},
    ):
        forge(saved, **changes)
        forged = load(saved)
        with pytest.raises(KeyFileError, match="header"):
            load_key(saved / "key", "p", forged.sites)
        (saved / "deepenc.json").write_bytes(true)
    save(saved.parent / "again", encrypted, key, victim={"name": "other"}, defense={})
    assert load_key(saved / "key", "p", load(saved.parent / "again").sites) == key


def test_keys_and_networks_have_a_short_repr(saved: Path, small: Net) -> None:
    model, inputs, sites = small
    _, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    mark = key.fingerprint[:12]
    assert repr(key) == f"Key(2 confusion channels at 1 of 1 sites, 4.8 bits, of the network {mark})"
    assert repr(load(saved)) == (
        f"Checkpoint(mlp encrypted with test: 9 tensors, 2 confusion channels at 1 sites, {mark})"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "header"),
        ("[1]", "header"),
        ("", "header"),
        ("[" * 100_000, "header"),
        ('{"format": "deepenc-network", "version": 2}', "newer deepenc"),
        ('{"format": "deepenc-network", "version": 1}', "Field required"),
        ('{"format": "deepenc-network", "version": "1"}', "version"),
    ],
)
def test_what_is_no_header(saved: Path, text: str, message: str) -> None:
    (saved / "deepenc.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        load(tmp_path / "none")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        load(saved)


def test_a_structure_of_another_architecture(saved: Path, two_sites: Net) -> None:
    read = load(saved)
    with pytest.raises(CheckpointError, match="architecture"):
        read.network(two_sites[0])
    wider = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 2))
    with pytest.raises(CheckpointError, match=r"architecture: tensor .* \(6,\)"):
        read.network(wider)


def test_saving_refuses_what_would_lose_data(saved: Path, small: Net, tmp_path: Path) -> None:
    model, inputs, sites = small
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=1, sites=sites)
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        save(saved, encrypted, key, victim=None, defense={})
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "file", encrypted, key, victim=None, defense={})
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "file" / "net", encrypted, key, victim=None, defense={})
    with pytest.raises(KeyFileError):
        save(tmp_path / "other", model, key, victim=None, defense={})
    with pytest.raises(CheckpointError, match="cannot write"):
        write_tensors(tmp_path / "no" / "model.safetensors", encrypted.state_dict())
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["file", "net"]
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", encrypted, key, victim=None, defense={})
    load(tmp_path / "empty")


def test_a_disk_that_fills_up_leaves_nothing_behind(
    small: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, sites = small
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=1, sites=sites)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(tmp_path / "net", encrypted, key, victim=None, defense={})
    with pytest.raises(CheckpointError, match="No space left"):
        write_tensors(tmp_path / "model.safetensors", encrypted.state_dict())
    assert os.listdir(tmp_path) == []


def test_a_moved_folder_is_read_and_shared_tensors_are_stored_once(tied_net: Net, tmp_path: Path) -> None:
    model, inputs, sites = tied_net
    encrypted, key = encrypt(model, inputs, DEFENSE, seed=0, sites=sites)
    save(tmp_path / "a", encrypted, key, victim=None, defense={})
    shutil.move(tmp_path / "a", tmp_path / "b")
    read = load(tmp_path / "b")
    assert read.tensors["left.weight"] is read.tensors["right.weight"]
    assert len(load_file(tmp_path / "b" / "model.safetensors")) == len(read.tensors) - 1
    network = read.network(model)
    assert network.left.weight is network.right.weight


def test_views_and_transposed_tensors_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"row": whole[1], "turned": whole.T, "half": whole[:, :2]}
    write_tensors(tmp_path / "t.safetensors", tensors)
    assert same(load_file(tmp_path / "t.safetensors"), tensors)
