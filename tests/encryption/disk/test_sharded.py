"""Checkpoints one tensor at a time, against the same networks encrypted and decrypted in memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deepenc
from deepenc.encryption.defense import Neurons, Weights
from deepenc.encryption.disk.checkpoint import decrypt_tensors, load
from deepenc.encryption.disk.header import HEADER, read_header
from deepenc.encryption.disk.sharded import shards as shards_module
from deepenc.encryption.disk.sharded.checkpoint import (
    decrypt_checkpoint,
    encrypt_checkpoint,
    load_sharded,
    sites_of,
)
from deepenc.encryption.disk.sharded.shards import INDEX, Entry, header_of, open_shards
from deepenc.encryption.disk.staging import partial_of
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, load_key, save_key
from deepenc.errors import CheckpointError, ConfigError, DeepencError, KeyFileError, PluginError, SiteError
from deepenc.network.sites import Site, Slot

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**BERT, "num_key_value_heads": 2, "max_position_embeddings": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
NETS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", {**BERT, "max_position_embeddings": 32}),
}


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    cls, config, sizes = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**SMALL, **sizes))
    return model.to(dtype).eval()  # type: ignore[no-any-return]


def saved(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, size: str = "8KB") -> Path:
    transformers.utils.logging.disable_progress_bar()
    network(name, dtype).save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return saved(tmp_path / "victim")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are taken in many pieces, as large ones are."""
    monkeypatch.setattr(shards_module, "CHUNK", 500)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        t.dtype == second[name].dtype and torch.equal(t, second[name]) for name, t in first.items()
    )


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [
        ("llama", torch.float32, "samp"),
        ("llama", torch.bfloat16, "mixed"),
        ("llama", torch.float16, "init"),
        ("gpt2", torch.bfloat16, "samp"),
        ("bert", torch.float32, "samp"),
        ("bert", torch.float16, "mixed"),
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, name: str, dtype: torch.dtype, weights: str) -> None:
    victim = saved(tmp_path / "victim", name, dtype)
    assert len(open_shards(victim).files) > 2
    key = encrypt_checkpoint(victim, tmp_path / "locked", f"paper-{weights}", seed=1)
    locked = tensors(tmp_path / "locked")
    assert not equal(locked, tensors(victim))
    assert all(tensor.dtype == dtype for tensor in locked.values())
    places = json.loads((tmp_path / "locked" / INDEX).read_bytes())
    assert places["metadata"]["total_size"] == sum(t.nbytes for t in locked.values())
    assert set(places["weight_map"]) == set(locked)
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert equal(tensors(tmp_path / "opened"), tensors(victim))
    before, after = files(victim), files(tmp_path / "opened")
    assert before.keys() == after.keys()
    assert json.loads(before[INDEX]) == json.loads(after[INDEX])
    if name == "llama":  # nothing is tied, so that the files are the same to the byte
        assert {n: b for n, b in before.items() if n != INDEX} == {
            n: b for n, b in after.items() if n != INDEX
        }
    words, cls = torch.arange(8)[None], getattr(transformers, NETS[name][0])
    with torch.no_grad():
        logits = [cls.from_pretrained(f).eval()(words).logits for f in (tmp_path / "opened", victim)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", NETS)
def test_what_is_written_is_an_encrypted_network(tmp_path: Path, name: str) -> None:
    """In memory it runs, gives other outputs, and decrypts with the very same key."""
    key = encrypt_checkpoint(saved(tmp_path / "victim", name), tmp_path / "locked", "paper-samp", seed=1)
    stored = load_sharded(tmp_path / "locked")
    assert fingerprint(stored.tensors) == key.fingerprint
    assert stored.factory is not None
    encrypted, original = stored.rebuild(), network(name)
    words = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.allclose(encrypted(words).logits, original(words).logits)
        restored = deepenc.decrypt(encrypted, key)
        assert equal(dict(restored.state_dict()), dict(original.state_dict()))
        assert torch.equal(restored(words).logits, original(words).logits)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("name", "weights"), [("llama", "samp"), ("gpt2", "mixed"), ("bert", "init"), ("gpt2", "entangled")]
)
def test_the_network_is_that_of_encrypt_in_memory(tmp_path: Path, name: str, weights: str) -> None:
    defense = {"name": "x", "placement": "proportional", "weights": weights}
    key = encrypt_checkpoint(saved(tmp_path / "victim", name), tmp_path / "locked", defense, seed=3)
    encrypted, other = deepenc.encrypt(network(name), None, defense, seed=3, sites=key.sites)
    assert key == other and sum(map(len, key.positions.values()))
    in_files, in_memory = load_sharded(tmp_path / "locked").tensors, encrypted.state_dict()
    assert in_files and equal(in_files, {tensor: in_memory[tensor] for tensor in in_files})


def test_confusion_entries_are_drawn_from_their_tensor(victim: Path, tmp_path: Path) -> None:
    key = encrypt_checkpoint(victim, tmp_path / "locked", "paper-samp", seed=1)
    locked, original, layout = tensors(tmp_path / "locked"), tensors(victim), key.layout()
    seen = {}
    for site in key.sites:
        for slot in site.slots:
            forged = locked[slot.tensor].index_select(slot.dim, layout.confusion_entries(site, slot))
            assert torch.isin(forged, original[slot.tensor]).all()
            pool = {value: i for i, value in enumerate(original[slot.tensor].flatten().tolist())}
            seen[slot.tensor] = [pool[value] for value in forged.flatten().tolist()]
    drawn = list(seen.values())
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i]), "each tensor has its own draws"


def test_a_mixed_neuron_has_one_coin_in_all_tensors(victim: Path, tmp_path: Path) -> None:
    defense = {"name": "x", "placement": {"name": "absolute", "count": 20}, "weights": "mixed"}
    key = encrypt_checkpoint(victim, tmp_path / "locked", defense, seed=1)
    locked, original, layout = tensors(tmp_path / "locked"), tensors(victim), key.layout()
    for site in key.sites:
        coins = []
        for slot in site.slots:
            forged = locked[slot.tensor].index_select(slot.dim, layout.confusion_entries(site, slot))
            rows = forged.movedim(slot.dim, 0).reshape(20, slot.block, -1)
            coins.append(torch.isin(rows, original[slot.tensor]).all(dim=2).all(dim=1).tolist())
        assert all(coin == coins[0] for coin in coins)
        assert 0 < sum(coins[0]) < 20


@pytest.mark.usefixtures("small_pieces")
def test_sites_that_meet_in_one_tensor(tmp_path: Path, victim: Path) -> None:
    """Both dimensions of a tensor grow, blocks of several entries among them, at any piece's edges."""
    model = network("llama")
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk"]
    role = deepenc.find_sites(network("bert"), {"input_ids": torch.arange(8)[None]})[0].slots[0].role
    rows = Site("rows", 8, (Slot(names[0], 0, role, 0, 4), Slot(names[1], 0, role, 0, 2)))
    columns = Site("columns", 16, (Slot(names[0], 1, role, 0, 2), Slot(names[1], 1, role, 16)))
    defense = {"name": "x", "placement": {"name": "absolute", "count": 5}, "weights": "samp"}
    sites = (rows, columns)
    key = encrypt_checkpoint(victim, tmp_path / "locked", defense, seed=1, sites=sites)
    assert tensors(tmp_path / "locked")[names[0]].shape == (32 + 20, 32 + 10)
    in_memory = decrypt_tensors(load_sharded(tmp_path / "locked").tensors, key)
    assert equal(in_memory, dict(model.state_dict()))
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert equal(tensors(tmp_path / "opened"), tensors(victim))


def test_a_single_file(tmp_path: Path) -> None:
    victim = saved(tmp_path / "victim", size="1GB")
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    assert load(tmp_path / "locked").fingerprint == key.fingerprint
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert files(tmp_path / "opened") == files(victim)


def test_a_head_less_checkpoint_is_encrypted_as_what_it_is(tmp_path: Path) -> None:
    """GPT-2 as it is published: config.json names the network with its head, the files are without."""
    victim = saved(tmp_path / "victim", "gpt2", size="1GB")
    inner = {n.removeprefix("transformer."): t for n, t in load_file(victim / "model.safetensors").items()}
    save_file(inner, victim / "model.safetensors", metadata={"format": "pt"})
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    assert load_sharded(tmp_path / "locked").factory.name == "GPT2Model"  # type: ignore[union-attr]
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert equal(tensors(tmp_path / "opened"), inner)


def test_weights_in_other_files_do_not_come_along(victim: Path, tmp_path: Path) -> None:
    (victim / "tokenizer.json").write_text("{}")
    (victim / "original").mkdir()
    for leak in ("pytorch_model.bin", "original/consolidated.00.pth", "old.safetensors", "tf_model.h5"):
        (victim / leak).write_bytes(b"weights")
    (victim / "pytorch_model.bin.index.json").write_text("{}")
    encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    own = {"config.json", "generation_config.json", "tokenizer.json", "deepenc.json", INDEX}
    shards = {path.name for path in victim.glob("model-*.safetensors")}
    assert {path.name for path in (tmp_path / "locked").iterdir()} == own | shards


SCRIPT = """
import os, sys, time
from pathlib import Path
from deepenc.encryption.disk.sharded import rewrite
from deepenc.encryption.disk.sharded.checkpoint import encrypt_checkpoint, decrypt_checkpoint, sites_of
from deepenc.encryption.keys.key import load_key, save_key
what, source, target, key = sys.argv[1:]
stream = rewrite._stream
def slow(shard, *rest):
    if shard.path.name.startswith("model-00004"):
        print("fourth", flush=True)
        time.sleep(60)
    return stream(shard, *rest)
rewrite._stream = slow
if what == "encrypt":
    encrypt_checkpoint(source, target, seed=5)
else:
    decrypt_checkpoint(source, load_key(key, "x", sites_of(source)), target)
"""


@pytest.mark.parametrize("what", ["encrypt", "decrypt"])
def test_killed_and_started_again(victim: Path, tmp_path: Path, what: str) -> None:
    locked, opened, again = (tmp_path / name for name in ("locked", "opened", "again"))
    key = encrypt_checkpoint(victim, locked, seed=5)
    save_key(key, tmp_path / "key", "x", 2**10)
    source, target = (victim, again) if what == "encrypt" else (locked, opened)
    command = [sys.executable, "-c", SCRIPT, what, str(source), str(target), str(tmp_path / "key")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "fourth" in process.stdout.readline()
        done = partial_of(target) / next(victim.glob("model-00003-*")).name
        for _ in range(100):  # finished is what is noted as finished
            if done.exists() and done.name in (partial_of(target) / "deepenc-run.json").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    stamp = done.stat().st_mtime_ns
    if what == "encrypt":
        assert encrypt_checkpoint(victim, again, seed=5) == key
        assert files(again) == files(locked)
        assert (again / done.name).stat().st_mtime_ns == stamp, "what was finished is not made again"
    else:
        decrypt_checkpoint(locked, key, opened)
        assert equal(tensors(opened), tensors(victim))
        assert (opened / done.name).stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def interrupted(victim: Path, target: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """An encryption that ends in the middle, as by Ctrl-C."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encrypt_checkpoint(victim, target, progress=stop, **how)


def test_another_run_does_not_use_what_was_finished(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encrypt_checkpoint(victim, tmp_path / "plain", seed=6)
    interrupted(victim, tmp_path / "locked", monkeypatch, seed=5)
    assert list(partial_of(tmp_path / "locked").glob("model-*"))
    assert encrypt_checkpoint(victim, tmp_path / "locked", seed=6) == plain
    assert files(tmp_path / "locked") == files(tmp_path / "plain")


def test_a_changed_victim_does_not_use_what_was_finished(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(victim, tmp_path / "locked", monkeypatch, seed=5)
    first = min(victim.glob("model-*"))
    save_file({n: t + 1 for n, t in load_file(first).items()}, first, metadata={"format": "pt"})
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=5)
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert equal(tensors(tmp_path / "opened"), tensors(victim))


def test_two_runs_at_once(victim: Path, tmp_path: Path) -> None:
    tries = []

    def meddle(done: int, total: int) -> None:
        if tries:
            return
        tries.append(done)
        with pytest.raises(CheckpointError, match="another process is at work"):
            encrypt_checkpoint(victim, tmp_path / "locked", seed=2)

    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=1, progress=meddle)
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")


def test_no_room(victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"GB are needed, 0\.00 GB are free"):
        encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    assert not (tmp_path / "locked").exists()


def test_a_disk_that_fills_up(victim: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle of a tensor."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(CheckpointError, match="start again when the disk"):
            encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "locked").exists()
    encrypt_checkpoint(victim, tmp_path / "locked", seed=1)


def test_a_target_that_cannot_be_written(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot read or write"):
        encrypt_checkpoint(victim, tmp_path / "file" / "locked", seed=1)
    with pytest.raises(CheckpointError, match="exists already"):
        encrypt_checkpoint(victim, victim, seed=1)
    with pytest.raises(CheckpointError, match="exists already"):
        encrypt_checkpoint(victim, tmp_path / "file", seed=1)


def change_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_bytes())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def rename(folder: Path, file: object) -> None:
    change_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": file}))


def cut(folder: Path) -> None:
    path = min(folder.glob("model-*"))
    path.write_bytes(path.read_bytes()[:-10])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "cannot read the tensors in"),
    "missing": (lambda folder: min(folder.glob("model-*")).unlink(), "cannot read the tensors in"),
    "outside": (lambda folder: rename(folder, "../model-00001-of-00002.safetensors"), "in the same folder"),
    "absolute": (lambda folder: rename(folder, "/etc/x.safetensors"), "in the same folder"),
    "no text": (lambda folder: rename(folder, 3), "in the same folder"),
    "other file": (lambda folder: rename(folder, "x.safetensors"), "cannot read the tensors in"),
    "swapped": (lambda folder: rename(folder, min(folder.glob("model-*")).name), "says is in"),
    "absent": (
        lambda folder: change_index(
            folder, lambda i: i["weight_map"].update(more=min(folder.glob("model-*")).name)
        ),
        "lacks 1 tensors",
    ),
    "no map": (lambda folder: change_index(folder, lambda i: i.pop("weight_map")), "no weight_map"),
    "no JSON": (lambda folder: (folder / INDEX).write_text("{"), "cut or altered"),
    "no index": (lambda folder: (folder / INDEX).unlink(), "neither"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_folders(victim: Path, tmp_path: Path, broken: str) -> None:
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    for folder in (victim, tmp_path / "locked"):
        BROKEN[broken][0](folder)
    with pytest.raises(CheckpointError, match=BROKEN[broken][1]):
        encrypt_checkpoint(victim, tmp_path / "again", seed=1)
    with pytest.raises(CheckpointError, match=BROKEN[broken][1]):
        decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "locked"}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_an_altered_tensor_is_not_decrypted(victim: Path, tmp_path: Path, name: str) -> None:
    locked = tmp_path / "locked"
    key = encrypt_checkpoint(victim, locked, seed=1)
    entry = open_shards(locked).entries()[name]
    path = locked / json.loads((locked / INDEX).read_bytes())["weight_map"][name]
    data = bytearray(path.read_bytes())
    data[entry.start + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were encrypted"):
        decrypt_checkpoint(locked, key, tmp_path / "opened")
    with pytest.raises(CheckpointError, match="not those that were saved"):
        load_sharded(locked)
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "locked"}


def test_another_key(victim: Path, tmp_path: Path) -> None:
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    other = encrypt_checkpoint(victim, tmp_path / "other", seed=2)
    with pytest.raises(KeyFileError, match="the key is for"):
        decrypt_checkpoint(tmp_path / "locked", other, tmp_path / "opened")
    with pytest.raises(KeyFileError, match="the key is for"):
        decrypt_checkpoint(tmp_path / "locked", Key(key.sites[:1], {}, key.fingerprint), tmp_path / "opened")
    assert sites_of(tmp_path / "locked") == key.sites
    with pytest.raises(CheckpointError, match="encrypted already"):
        encrypt_checkpoint(tmp_path / "locked", tmp_path / "twice", seed=1)


class Whole(Weights):
    """Needs all tensors of a site."""

    name: ClassVar[str] = "whole"

    def fill(self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator) -> list[Tensor]:
        return [gap.victim.new_zeros(gap.shape) for gap in neurons.gaps]


class Wrong(Whole):
    """Fills nothing."""

    per_tensor: ClassVar[bool] = True

    def fill(self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator) -> list[Tensor]:
        return []


class NotFinite(Wrong):
    """Fills with infinity."""

    def fill(self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator) -> list[Tensor]:
        return [gap.victim.new_full(gap.shape, float("inf")) for gap in neurons.gaps]


def test_defenses_that_cannot_be_streamed(victim: Path, tmp_path: Path) -> None:
    defense: dict[str, Any] = {"name": "x", "placement": "proportional"}
    with pytest.raises(ConfigError, match="inserts nothing"):
        encrypt_checkpoint(victim, tmp_path / "locked", "null")
    with pytest.raises(ConfigError, match="need all of a site's tensors"):
        encrypt_checkpoint(victim, tmp_path / "locked", {**defense, "weights": Whole()})
    for weights, message in ((Wrong(), "expected a tensor for each"), (NotFinite(), "finite")):
        with pytest.raises(PluginError, match=message):
            encrypt_checkpoint(victim, tmp_path / "locked", {**defense, "weights": weights})
    assert {p.name for p in tmp_path.iterdir()} == {"victim"}


def test_sites_of_another_network(victim: Path, tmp_path: Path) -> None:
    sites = encrypt_checkpoint(victim, tmp_path / "locked", seed=1).sites
    slot = dataclasses.replace(sites[0].slots[0], tensor="elsewhere")
    with pytest.raises((SiteError, CheckpointError), match="elsewhere"):
        encrypt_checkpoint(victim, tmp_path / "again", sites=(dataclasses.replace(sites[0], slots=(slot,)),))


def test_configurations_that_do_not_fit(victim: Path, tmp_path: Path) -> None:
    config = json.loads((victim / "config.json").read_bytes())
    for changes, message in (
        ({"architectures": None}, "architectures"),
        ({"architectures": ["os"]}, "transformers"),
        ({"intermediate_size": 64}, "by config.json it is"),
    ):
        (victim / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    (victim / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        encrypt_checkpoint(victim, tmp_path / "locked", seed=1)


def test_a_quantised_file(tmp_path: Path, victim: Path) -> None:
    first = min(victim.glob("model-*"))
    data = first.read_bytes()
    first.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"U32"'))
    with pytest.raises(CheckpointError, match="quantised"):
        encrypt_checkpoint(victim, tmp_path / "locked", seed=1)


def test_header_is_what_the_library_reads(tmp_path: Path) -> None:
    things = {"a": torch.arange(3), "ü": torch.tensor(2.5), "none": torch.empty(0, 4), "b": torch.ones(2, 2)}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in things.items()]
    body = b"".join(tensor.numpy().tobytes() for tensor in things.values())
    (tmp_path / "model.safetensors").write_bytes(header_of(entries, {"format": "pt"}) + body)
    assert equal(load_file(tmp_path / "model.safetensors"), things)
    found = open_shards(tmp_path).entries()
    assert {(e.name, e.shape, e.dtype) for e in found.values()} == {
        (e.name, e.shape, e.dtype) for e in entries
    }


def test_replacing_a_target(victim: Path, tmp_path: Path) -> None:
    encrypt_checkpoint(victim, tmp_path / "locked", seed=1)
    key = encrypt_checkpoint(victim, tmp_path / "locked", seed=2, replace_target=True)
    decrypt_checkpoint(tmp_path / "locked", key, tmp_path / "opened")
    assert not list(tmp_path.glob(".*"))
    assert os.listdir(tmp_path / "opened")


def resaved(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A checkpoint in one file, its tensors changed."""
    saved(folder, size="1GB")
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"more": torch.ones(2)}, "1 tensors that it has not, such as .'more'"),
        (lambda state: {n.replace("norm", "Norm"): t for n, t in state.items()}, "lacks 5 of its tensors"),
        (lambda state: {n: t for n, t in state.items() if "layers.1" not in n}, "lacks 9 of its tensors"),
        (lambda state: state | {"lm_head.weight": torch.ones(9, 32)}, r"\(9, 32\), by config.json"),
        (lambda state: {f"module.{n}": t for n, t in state.items()}, "prefix 'module.' of DataParallel"),
        (
            lambda state: {f"_orig_mod.{n}": t for n, t in state.items()},
            "prefix '_orig_mod.' of torch.compile",
        ),
    ],
)
def test_what_could_not_be_rebuilt_is_not_encrypted(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        encrypt_checkpoint(resaved(tmp_path / "victim", change), tmp_path / "locked")
    assert os.listdir(tmp_path) == ["victim"]


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 10**6), ("num_labels", 10**8)])
def test_a_configuration_of_a_network_far_too_large(
    victim: Path, tmp_path: Path, field: str, value: int
) -> None:
    config = json.loads((victim / "config.json").read_bytes())
    (victim / "config.json").write_text(json.dumps(config | {field: value}))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="larger than its tensors"):
        encrypt_checkpoint(victim, tmp_path / "locked")
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_masks_that_older_libraries_stored_come_along(tmp_path: Path, size: str) -> None:
    """As in GPT-2's own files; they are no tensors of the network, and an altered one is noticed."""
    victim, locked = saved(tmp_path / "victim", "gpt2", size=size), tmp_path / "locked"
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    masks |= {"empty": torch.empty(0, 4), "step": torch.tensor(3.0)}
    first = min(victim.glob("*.safetensors"))
    save_file(load_file(first) | masks, first, metadata={"format": "pt"})
    if size == "20KB":
        change_index(victim, lambda index: index["weight_map"].update(dict.fromkeys(masks, first.name)))
    key = encrypt_checkpoint(victim, locked, seed=1)
    stored = load_sharded(locked)
    assert not masks.keys() & stored.tensors.keys()
    assert equal(
        dict(deepenc.decrypt(stored.rebuild(), key).state_dict()), dict(network("gpt2").state_dict())
    )
    decrypt_checkpoint(locked, key, tmp_path / "opened")
    assert equal(tensors(tmp_path / "opened"), tensors(victim))
    path = locked / first.name
    save_file(
        load_file(path) | {name: -mask for name, mask in masks.items()}, path, metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="not the one that was saved"):
        load_sharded(locked)
    with pytest.raises(CheckpointError, match="not those that were encrypted"):
        decrypt_checkpoint(locked, key, tmp_path / "again")


def test_a_single_file_beside_an_index(victim: Path, tmp_path: Path) -> None:
    """One of the two is out of date; libraries differ in which they read."""
    save_file(tensors(victim), victim / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="remove the one that is out of date"):
        encrypt_checkpoint(victim, tmp_path / "locked")


def test_files_that_stand_for_others(tmp_path: Path) -> None:
    victim = saved(tmp_path / "victim", size="1GB")
    (victim / "model.safetensors").rename(victim / "model.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"there is model\.fp16\.safetensors: save it without a variant"
    ):
        encrypt_checkpoint(victim, tmp_path / "locked")
    (victim / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        encrypt_checkpoint(victim, tmp_path / "locked")


def test_empty_tensors_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    things = {"none": torch.empty(0), "wide": torch.empty(0, 4), "one": torch.tensor(3.0)}
    save_file(things, path)
    (shard,) = open_shards(tmp_path).files
    with shards_module.Reader(path) as reader:
        assert equal({entry.name: reader.read(entry) for entry in shard.entries}, things)


@pytest.mark.parametrize("name", ["deepenc.json", INDEX, "config.json", "model-00001", "key"])
def test_pipes_devices_and_folders_instead_of_files(victim: Path, tmp_path: Path, name: str) -> None:
    """They are refused at once: reading a pipe waits for ever, and reading /dev/zero never ends."""
    locked = tmp_path / "locked"
    key = encrypt_checkpoint(victim, locked, seed=1)
    save_key(key, tmp_path / "key", "p", 2**10)
    path = next((tmp_path if name == "key" else victim if name == "config.json" else locked).glob(f"{name}*"))
    for make in (
        os.mkfifo,
        os.mkdir,
        lambda p: os.symlink("/dev/zero", p),
        lambda p: os.symlink("/dev/null", p),
    ):
        path.rename(tmp_path / "aside")
        make(path)
        with pytest.raises(DeepencError):
            decrypt_checkpoint(locked, load_key(tmp_path / "key", "p", sites_of(locked)), tmp_path / "opened")
            encrypt_checkpoint(victim, tmp_path / "again")
        path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "aside").rename(path)


def test_a_forged_header_does_not_decrypt(victim: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    key = encrypt_checkpoint(victim, locked, seed=1)
    save_key(key, tmp_path / "key", "p", 2**10)
    assert load_key(tmp_path / "key", "p", sites_of(locked)) == key
    forged = read_header(locked / HEADER).model_copy(update={"defense": {"name": "other"}}).digested()
    (locked / HEADER).write_text(forged.model_dump_json())
    with pytest.raises(KeyFileError, match="header"):
        decrypt_checkpoint(locked, key, tmp_path / "opened")
    with pytest.raises(KeyFileError, match="header"):
        load_key(tmp_path / "key", "p", sites_of(locked))
