"""A user's own network and data: every form of data, parts that share nothing, words for what is wrong."""

from __future__ import annotations

import csv
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deepenc.arena.build import Subject
from deepenc.errors import ConfigError, VictimError
from deepenc.plugins import build
from deepenc.victims.sources.own import Own
from deepenc.victims.validation import validated

MODULE = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset


def build(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def rows(count, seed):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :3].argmax(1)


def unseen():
    return TensorDataset(*rows(200, 1))


def overlapping():
    first, second = rows(200, 1), rows(30, 2)
    return TensorDataset(torch.cat([first[0][:50], second[0]]), torch.cat([first[1][:50], second[1]]))


def labels_beyond():
    inputs, labels = rows(200, 1)
    return TensorDataset(inputs, labels + 5)


def one_class():
    inputs, labels = rows(200, 1)
    return TensorDataset(inputs, torch.zeros_like(labels))


def not_finite():
    inputs, labels = rows(200, 1)
    inputs[3, 1] = torch.nan
    return TensorDataset(inputs, labels)


class Uneven(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.randn(4 if index != 17 else 5), 0


def uneven():
    return Uneven()


def empty():
    return TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def words():
    return "words"


def raises():
    raise RuntimeError("no such table")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"their_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folder of the command is found by itself
    yield name
    sys.modules.pop(name, None)


def own(module: str, data: str = "unseen", **more: Any) -> Own:
    return Own(factory=f"{module}:build", data=f"{module}:{data}" if ":" not in data else data, **more)


def rows_of(examples: Any) -> set[bytes]:
    return set(examples.digests())


def test_a_function_s_data_are_shared_out(module: str, tmp_path: Path) -> None:
    victim = validated(own(module).load(tmp_path))
    parts = (victim.defender, victim.attacker, victim.judge)
    assert [len(part) for part in parts] == [40, 80, 80] and not any(part.stored for part in parts)
    held = [rows_of(part) for part in parts]
    assert len(set.union(*held)) == 200
    assert victim.task.classes == 3 and Subject.of(victim).sites  # type: ignore[attr-defined]
    again = own(module).load(tmp_path)
    assert again.fingerprint == victim.fingerprint
    assert own(module, shares=(0.4, 0.3, 0.3)).load(tmp_path).fingerprint != victim.fingerprint


def test_what_the_network_was_trained_on_is_in_no_other_part(module: str, tmp_path: Path) -> None:
    source = own(module, training=f"{module}:overlapping")
    victim = validated(source.load(tmp_path))
    assert len(victim.defender) == 80 and len(victim.attacker) == len(victim.judge) == 75
    assert not rows_of(victim.defender) & (rows_of(victim.attacker) | rows_of(victim.judge))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_in_a_file(module: str, tmp_path: Path, suffix: str) -> None:
    inputs = np.random.default_rng(0).normal(size=(90, 4))
    labels = np.arange(90, dtype=np.int32) % 3
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, inputs=inputs, labels=labels)
    else:
        save_file({"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}, path)
    victim = validated(Own(factory=f"{module}:build", data=str(path)).load(tmp_path))
    assert victim.judge.stored and victim.judge.inputs.dtype == torch.float32
    assert victim.judge.targets.dtype == torch.int64 and len(victim.judge) == 36


def test_a_folder_of_images_is_read_image_by_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(30):
        folder = tmp_path / "pictures" / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    source = Own(
        factory={"library": "torchvision", "name": "resnet18", "arguments": {"num_classes": 2}},
        data=str(tmp_path / "pictures"),
        size=32,
    )
    victim = source.load(tmp_path)
    assert [len(p) for p in (victim.defender, victim.attacker, victim.judge)] == [6, 12, 12]
    inputs, targets = victim.judge.batch([0, 1])
    assert inputs.shape == (2, 3, 32, 32) and set(targets.tolist()) <= {0, 1}
    assert not victim.judge.stored


def test_texts_in_a_table_want_a_tokenizer(module: str, tmp_path: Path) -> None:
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *((f"good {i}", i % 2) for i in range(20))])
    with pytest.raises(VictimError, match=r"texts.csv holds texts; give `tokenizer`"):
        Own(factory=f"{module}:build", data="texts.csv").load(tmp_path)
    with pytest.raises(VictimError, match="the tokenizer 'nowhere' cannot be used"):
        Own(factory=f"{module}:build", data="texts.csv", tokenizer="nowhere").load(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("labels_beyond", r"victim .*'s targets: expected classes from 0 and below 3, .* got 5 to 7"),
        ("not_finite", r"example \d+ has values that are not finite; repair or remove it"),
        ("uneven", r"differ in form: float32 \(5,\).*resizing or padding"),
        ("empty", "the data set is empty; give one with examples"),
        ("words", "expected a data set of pairs .*, got str"),
        ("one_class", "all of 80 of the judge's examples are of one class"),
        ("raises", r"raises cannot be made \(RuntimeError: no such table\)"),
        ("nothing", r"nothing cannot be made \(AttributeError"),
        ("nowhere.csv:x", "cannot be made"),
    ],
)
def test_data_that_cannot_be_used_are_told(module: str, tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(VictimError, match=message):
        validated(own(module, data).load(tmp_path))


def test_other_mistakes(module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shares that sum up to 1"):
        build("victim", {"name": "own", "factory": f"{module}:build", "shares": [0.5, 0.5, 0.5]})
    with pytest.raises(VictimError, match="needs data; give `data`"):
        Own(factory=f"{module}:build").load(tmp_path)
    with pytest.raises(VictimError, match=r"no data at 'nothing-here'; expected a function"):
        Own(factory=f"{module}:build", data="nothing-here").load(tmp_path)
    with pytest.raises(VictimError, match="do not make parts of"):
        own(module, shares=(0.001, 0.5, 0.499)).load(tmp_path)


def test_its_scope_reaches_the_sites(module: str, tmp_path: Path) -> None:
    victim = own(module, scope="0").load(tmp_path)
    assert victim.scope == "0"
