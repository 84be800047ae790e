"""Encrypted networks that another process makes anew from a folder: structure by factory, never by pickle."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepenc.encryption.disk.checkpoint import decrypt_tensors, load, save
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.keys.key import Key
from deepenc.errors import CheckpointError, KeyFileError
from deepenc.network.calling import call
from deepenc.network.factory import Factory
from deepenc.network.find import find_sites
from deepenc.network.structure import named_tensors

DEFENSE = {"base": "paper-init", "name": "test", "placement": "absolute:count=2"}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**TINY, "vocab_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
VIT = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
TOKENS = {"input_ids": torch.arange(8).view(1, 8), "use_cache": False}
OWN = """
from torch import nn


def build(width):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
"""

NETWORKS: dict[str, tuple[Any, Any]] = {
    "resnet": ("torchvision:resnet18", torch.randn(1, 3, 32, 32)),
    "timm": (
        {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": VIT},
        torch.randn(1, 3, 32, 32),
    ),
    "bert": (
        {"library": "transformers", "name": "BertModel", "arguments": {**TINY, "vocab_size": 20}},
        {"input_ids": TOKENS["input_ids"]},
    ),
    "gpt2": ({"library": "transformers", "name": "GPT2LMHeadModel", "arguments": GPT2}, TOKENS),
    "llama": ({"library": "transformers", "name": "LlamaForCausalLM", "arguments": LLAMA}, TOKENS),
    "ours": (
        {"library": "python", "name": "deepenc.victims.models:CifarResNet", "arguments": {"depth": 8}},
        torch.randn(1, 3, 16, 16),
    ),
    "own": (
        {"library": "python", "name": "own_networks:build", "arguments": {"width": 9}},
        torch.randn(4, 3),
    ),
}

REBUILD = """
import sys, torch
from deepenc.encryption.disk.checkpoint import load
from deepenc.network.tracing.tracer import call
from torch.utils._pytree import tree_leaves
outputs = {}
for name, example in torch.load(sys.argv[1], weights_only=True).items():
    network = load(name).rebuild(allow=("own_networks:build",))
    with torch.no_grad():
        outputs[name] = [x for x in tree_leaves(call(network, example)) if isinstance(x, torch.Tensor)]
torch.save(outputs, "outputs.pt")
"""


def outputs(network: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(network, example)) if isinstance(leaf, Tensor)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every network of the list encrypted and saved, with what it answered."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "own_networks.py").write_text(OWN)
    return folder


Made = dict[str, tuple[nn.Module, nn.Module, Key, Any]]


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    """By name: the victim, the encrypted network, its key, and an example."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name, (spec, example) in NETWORKS.items():
            victim = Factory.of(spec).build(allow=("own_networks:build",))
            encrypted, key = encrypt(victim, example, DEFENSE, seed=0)
            save(folder / name, encrypted, key, factory=spec, defense=DEFENSE)
            result[name] = victim, encrypted, key, example
    sys.modules.pop("own_networks", None)
    return result


def test_another_process_rebuilds_each_of_them(folder: Path, made: Made) -> None:
    torch.save({name: example for name, (*_, example) in made.items()}, folder / "examples.pt")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", REBUILD, "examples.pt"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
    got = torch.load(folder / "outputs.pt", weights_only=True)
    for name, (victim, encrypted, _, example) in made.items():
        expected = outputs(encrypted, example)
        assert len(expected) == len(got[name]) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, got[name], strict=True)), name
        assert not torch.allclose(expected[0], outputs(victim, example)[0]), name


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "own"])
def test_what_is_rebuilt_decrypts_to_the_victim(folder: Path, made: Made, name: str) -> None:
    victim, encrypted, key, _ = made[name]
    read = load(folder / name)
    network = read.rebuild()
    ours, theirs = named_tensors(network), named_tensors(encrypted)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    restored, original = named_tensors(decrypt(network, key)), named_tensors(victim)
    assert all(torch.equal(restored[name], tensor) for name, tensor in original.items())
    plain = decrypt_tensors(read.tensors, key)
    assert set(plain) == set(victim.state_dict())
    assert all(torch.equal(plain[name], tensor) for name, tensor in victim.state_dict().items())


def test_buffers_that_no_state_dict_keeps_are_saved_and_fingerprinted(folder: Path, made: Made) -> None:
    _, encrypted, key, _ = made["llama"]
    read = load(folder / "llama")
    buffers = {slot.tensor for site in read.sites for slot in site.slots if not slot.persistent}
    assert buffers and not buffers & set(encrypted.state_dict())
    (name, *_) = buffers
    assert torch.equal(load_file(folder / "llama" / "model.safetensors")[name], read.tensors[name])
    changed = read.rebuild()
    named_tensors(changed)[name].mul_(2)
    with pytest.raises(KeyFileError):
        decrypt(changed, key)


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a folder with a changed header, its digest made to fit."""
    target.mkdir()
    os.link(source / "model.safetensors", target / "model.safetensors")
    header = json.loads((source / "deepenc.json").read_text())
    change(header)
    del header["digest"]
    header["digest"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    (target / "deepenc.json").write_text(json.dumps(header))
    return target


def test_a_folder_from_before_factories_still_loads(folder: Path, made: Made, tmp_path: Path) -> None:
    def older(header: dict[str, Any]) -> None:
        del header["factory"]
        for site in header["sites"]:
            del site["contracted"], site["settings"]

    read = load(rewritten(folder / "ours", tmp_path / "old", older))
    assert read.factory is None
    victim, encrypted, _, example = made["ours"]
    assert torch.equal(read.network(victim)(example), encrypted(example))
    with pytest.raises(CheckpointError, match="does not say how"):
        read.rebuild()


@pytest.mark.usefixtures("made")
def test_a_function_of_somebody_s_own_must_be_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    read = load(folder / "own")
    with pytest.raises(CheckpointError, match=r"allow=\('own_networks:build',\)"):
        read.rebuild()
    assert "own_networks" not in sys.modules
    assert isinstance(read.rebuild(allow=("own_networks:build",)), nn.Module)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("torchvision:resnet34", "architecture"),
        ({**NETWORKS["bert"][0], "arguments": {**TINY, "vocab_size": 10**12}}, "larger than its tensors"),
        (
            {**NETWORKS["bert"][0], "arguments": {**TINY, "num_hidden_layers": 10**6}},
            "larger than its tensors",
        ),
        ({**NETWORKS["bert"][0], "arguments": {**TINY, "num_labels": 10**8}}, "larger than its tensors"),
        ({**NETWORKS["ours"][0], "arguments": {"depth": 600_002}}, "larger than its tensors"),
        (
            {**NETWORKS["ours"][0], "arguments": {"depth": 8, "channels": 40_000_000}},
            "larger than its tensors",
        ),
        ({**NETWORKS["bert"][0], "arguments": {**TINY, "vocab_size": 21}}, "architecture"),
    ],
)
def test_a_forged_factory_is_a_clear_error_and_takes_no_memory(
    folder: Path, tmp_path: Path, factory: Any, message: str
) -> None:
    forged = rewritten(folder / "bert", tmp_path / "forged", lambda header: header.update(factory=factory))
    with pytest.raises(CheckpointError, match=message):
        load(forged).rebuild()


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("factory", "resnet18", "library:name"),
        ("factory", {"library": "pickle", "name": "x"}, "library"),
        ("factory", 3, "factory"),
        ("pickle", "x", "unknown field"),
    ],
)
def test_a_forged_header_does_not_load(
    folder: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    forged = rewritten(folder / "bert", tmp_path / "forged", lambda header: header.update({field: value}))
    with pytest.raises(CheckpointError, match=message):
        load(forged)


def test_the_sites_of_a_sketch_are_those_of_the_network(made: Made) -> None:
    _, _, key, example = made["ours"]
    sketch = Factory.of(NETWORKS["ours"][0]).build("meta")
    assert tuple(find_sites(sketch, example.to("meta"))) == key.sites
