"""Files of weights as people have them: wrapped, prefixed, pickled whole, damaged."""

from __future__ import annotations

import io
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.victims.weights import load_into, read_state


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def trained() -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in network().state_dict().items()}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in trained().items()}


WRAPPED: dict[str, Any] = {
    "plain": trained(),
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "a submodule compiled": {n.replace("0.", "0._orig_mod.", 1): t for n, t in trained().items()},
    "Lightning": {"state_dict": prefixed("model."), "epoch": 3, "pytorch-lightning_version": "2"},
    "with an optimizer": {"model": trained(), "optimizer": {"state": {0: {"buffer": torch.ones(1)}}}},
    "in an entry of its own": {"my_network": trained(), "best": 0.9},
    "an entry in an entry": {"checkpoint": {"state_dict": trained(), "step": 1}},
    "averaged": {**prefixed("module."), "n_averaged": torch.tensor(3)},
    "without counts": {n: t for n, t in trained().items() if "num_batches" not in n},
    "as parameters": {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in trained().items()},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_inside_what_wraps_them(tmp_path: Path, name: str) -> None:
    torch.save(WRAPPED[name], tmp_path / "w.pt")
    model = network()
    load_into(model, tmp_path / "w.pt", "mine")
    for key, tensor in model.state_dict().items():
        if not (name == "without counts" and "num_batches" in key):
            assert torch.equal(tensor, trained()[key])


def test_a_network_that_has_such_names_itself_is_not_unwrapped(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("module", network())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    load_into(model, tmp_path / "w.pt", "mine")
    save_file(prefixed("module."), tmp_path / "w.safetensors")
    load_into(model, tmp_path / "w.safetensors", "mine")
    assert torch.equal(model.state_dict()["module.0.weight"], trained()["0.weight"])


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({**prefixed("encoder."), "projector.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO):
        load_into(network(), tmp_path / "w.safetensors", "mine")
    assert "without the prefix 'encoder.'" in caplog.text and "projector.weight" in caplog.text


class Hidden:
    """Any class of the user's."""


REFUSED: dict[str, tuple[Any, str]] = {
    "a whole module": (network(), r"object \(torch\.nn\.modules\.container\.Sequential\).*`state_dict\(\)`"),
    "a module in an entry": ({"model": network(), "epoch": 1}, r"a Python object \(torch\.nn\.modules"),
    "an object": ({"args": Hidden(), "state_dict": trained()}, r"a Python object \(.*Hidden\)"),
    "a list": ([1, 2], "expected a state dict, got list"),
    "nothing": ({}, "expected a state dict, got an empty mapping"),
    "numbers": ({"epoch": 3, "x": torch.ones(1)}, r"got a mapping with 'epoch' \(int\)"),
    "two networks": ({"first": trained(), "second": trained()}, "several sets of weights: 'first', 'second'"),
    "a tensor": (torch.ones(3), "expected a state dict, got Tensor"),
    "a sparse tensor": ({**trained(), "0.weight": torch.eye(3).to_sparse()}, "'0.weight' is sparse"),
    "a meta tensor": ({**trained(), "0.weight": torch.ones(4, device="meta")}, "'0.weight' is sparse"),
    "another shape": ({**trained(), "3.weight": torch.ones(3, 4)}, r"1 tensors differ, first \['3.weight'\]"),
    "complex": ({**trained(), "3.bias": torch.ones(2) * 1j}, r"1 tensors differ, first \['3.bias'\]"),
    "one more": ({**trained(), "stranger": torch.ones(1)}, r"1 tensors differ, first \['stranger'\]"),
    "one less": ({n: t for n, t in trained().items() if n != "3.bias"}, r"1 tensors .* \['3.bias'\]"),
    "another network": ({"conv.weight": torch.ones(3)}, "9 tensors differ"),
    "a buffer of another shape": ({**trained(), "1.running_mean": torch.ones(9)}, "1 tensors differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_weights_is_refused_in_words(tmp_path: Path, name: str) -> None:
    held, message = REFUSED[name]
    torch.save(held, tmp_path / "w.pt")
    model = network()
    with pytest.raises(VictimError, match=message) as caught:
        load_into(model, tmp_path / "w.pt", "mine")
    assert str(tmp_path / "w.pt") in str(caught.value)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(t, network().state_dict()[n]) for n, t in model.state_dict().items())


def test_torchscript_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:  # what makes torch take a file for one
        archive.writestr("w/constants.pkl", b"")
        archive.writestr("w/data.pkl", b"")
        archive.writestr("w/version", b"3\n")
    with pytest.raises(VictimError, match="a TorchScript archive; save the network's"):
        read_state(tmp_path / "w.pt")


def test_files_of_other_kinds_are_named_and_nothing_waits(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 548105171\n"
    for suffix in ("pt", "safetensors"):
        (tmp_path / f"pointer.{suffix}").write_bytes(pointer)
        (tmp_path / f"script.{suffix}").write_text("import torch\nprint('this is no file of weights')\n")
        (tmp_path / f"empty.{suffix}").write_bytes(b"")
        (tmp_path / f"folder.{suffix}").mkdir()
        (tmp_path / f"link.{suffix}").symlink_to("gone.pt")
        (tmp_path / f"device.{suffix}").symlink_to("/dev/zero")
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        messages = {
            "pointer": "is a pointer of Git LFS, not the weights themselves; fetch them: git lfs pull",
            "script": "not a file of weights: it is damaged, or something else",
            "empty": "not a file of weights: it is damaged, or something else",
            "folder": "is a folder, not a file of weights",
            "link": "is a broken link, not a file of weights",
            "device": "is a pipe or device, not a file of weights",
            "pipe": "is a pipe or device, not a file of weights",
            "missing": "is missing, not a file of weights",
        }
        for name, message in messages.items():
            with pytest.raises(VictimError, match=message) as caught:
                read_state(tmp_path / f"{name}.{suffix}")
            assert "weights_only" not in str(caught.value) and "issue" not in str(caught.value)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "flips", [pytest.param(100, id="some"), pytest.param(5000, id="many", marks=pytest.mark.long)]
)
def test_damaged_weights_are_weights_or_refused(tmp_path: Path, form: str, flips: int) -> None:
    """Bits flipped in the pickle inside, and files cut: tensors come out, or a clear error; nothing else."""
    path, rng, refused = tmp_path / f"w.{form}", np.random.default_rng(0), 0
    if form == "safetensors":
        save_file(trained(), path)
    else:
        torch.save({"state_dict": trained(), "epoch": 1}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for number in range(flips):
        path.write_bytes(_cut(whole, rng) if number % 10 == 0 else _flipped(whole, rng, form))
        try:
            load_into(network(), path, "mine")
        except VictimError as error:
            refused += 1
            assert "weights_only" not in str(error)
    assert refused > 0.5 * flips


def _cut(whole: bytes, rng: np.random.Generator) -> bytes:
    return whole[: rng.integers(len(whole))]


def _flipped(whole: bytes, rng: np.random.Generator, form: str) -> bytes:
    """A file with some bits of its description turned, a zip's checksums made right again."""

    def turned(data: bytes, reach: int) -> bytes:
        changed = bytearray(data)
        for at in rng.integers(0, min(reach, len(data)), rng.integers(1, 5)):
            changed[at] ^= 1 << rng.integers(8)
        return bytes(changed)

    if form != "zip":
        return turned(whole, 1500)
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, turned(data, len(data)) if name.endswith("data.pkl") else data)
    return target.getvalue()
