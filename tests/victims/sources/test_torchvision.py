"""Torchvision models with images in folders; no downloads."""

from __future__ import annotations

import itertools
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from deepenc.errors import VictimError
from deepenc.victims.data.splits import digests
from deepenc.victims.sources.torchvision import Torchvision


def fill(folder: Path, classes: list[str], each: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"), ["ant", "bee", "cow"], 6, 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "three.pt"
    torch.manual_seed(1)
    torch.save(models.squeezenet1_1(num_classes=3).state_dict(), path)
    return path


def source(folder, weights="none", **fields):
    sizes = {"defender_images": 3, "attacker_images": 5, "judge_images": 6}
    plain = {"model": "squeezenet1_1", "classes": 3, "folder": folder, "weights": str(weights)}
    return Torchvision(**plain | sizes | fields)


def contents(victim):
    return [set(digests(p.inputs.numpy())) for p in (victim.defender, victim.attacker, victim.judge)]


def test_parts_of_one_folder_do_not_overlap(folder, weights, tmp_path):
    victim = source(folder, weights).load(tmp_path)
    assert [len(part) for part in contents(victim)] == [3, 5, 6]
    assert all(not one & two for one, two in itertools.combinations(contents(victim), 2))
    assert victim.name == "squeezenet1_1"
    assert victim.judge.inputs.shape == (6, 3, 224, 224)
    assert source(folder, weights).load(tmp_path).fingerprint == victim.fingerprint


def test_labels_are_those_of_the_folders(folder, tmp_path):
    by_name = {"ant": 0, "bee": 1, "cow": 2}
    victim = source(folder).load(tmp_path)
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    truth = {
        digests(transform(Image.open(path).convert("RGB"))[None].numpy())[0]: by_name[path.parent.name]
        for path in folder.glob("*/*.png")
    }
    found = digests(victim.judge.inputs.numpy())
    assert [truth[content] for content in found] == victim.judge.targets.tolist()


def test_labels_of_numbered_folders_are_their_numbers(tmp_path):
    for number in range(12):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        for shade in range(2):
            Image.new("RGB", (40, 40), (20 * number + shade,) * 3).save(
                tmp_path / "images" / str(number) / f"{shade}.png"
            )
    sizes = {"defender_images": 8, "attacker_images": 8, "judge_images": 8}
    victim = source(tmp_path / "images", classes=12, **sizes).load(tmp_path)
    for part in (victim.defender, victim.attacker, victim.judge):
        shades = (part.inputs[:, 0, 112, 112] * 0.229 + 0.485) * 255
        assert ((shades + 0.5) // 20).long().tolist() == part.targets.tolist()


def test_the_same_image_in_files_of_two_formats_is_one(tmp_path):
    images = fill(tmp_path / "images", ["ant", "bee", "cow"], 5, 0)
    for path in list(images.glob("*/*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
    parts = contents(source(images).load(tmp_path))
    assert sum(map(len, parts)) == 14 and len(set.union(*parts)) == 14


def test_images_of_the_defenders_folder_are_nobody_elses(folder, tmp_path):
    own = fill(tmp_path / "own", ["ant", "bee", "cow"], 1, 5)
    for name in ("ant", "bee", "cow"):  # the same content again, under another name
        (own / name / "copy.png").write_bytes((folder / name / "0.png").read_bytes())
    victim = source(folder, defender_folder=own, defender_images=6).load(tmp_path)
    assert len(contents(victim)[0]) == 6
    assert all(not one & two for one, two in itertools.combinations(contents(victim), 2))
    with pytest.raises(VictimError, match="expected 16 different images"):
        source(folder, defender_folder=own, defender_images=6, judge_images=11).load(tmp_path)


def test_weights_of_a_file(folder, weights, tmp_path):
    network, example = source(None, weights).network(tmp_path)
    stored = torch.load(weights, weights_only=True)
    assert all(torch.equal(t, stored[name]) for name, t in network.state_dict().items())
    assert network(example).shape == (1, 3) and not network.training


def test_no_weights_are_the_same_random_ones_and_touch_no_generator(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (source(None).network(tmp_path)[0].state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(t, two[name]) for name, t in one.items())


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(VictimError, match="give its path as `weights`"):
        Torchvision(model="squeezenet1_1").network(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "squeezenet1_0x"}, "did you mean 'squeezenet1_0'"),
        ({"model": "fcn_resnet50"}, "no model 'fcn_resnet50'"),
        ({"weights": "IMAGENET1K_V9"}, "did you mean 'IMAGENET1K_V1'"),
        ({"weights": "DEFAULT"}, "have 1000 classes"),
        ({"folder": None}, "give `folder`"),
        ({"folder": Path("/nowhere")}, "nowhere"),
        ({"classes": 4}, "3 class folders"),
        ({"judge_images": 11}, "expected 19 different images"),
    ],
)
def test_bad_input_is_a_clear_error(folder, tmp_path, fields, message):
    with pytest.raises(VictimError, match=message):
        source(**{"folder": folder} | fields).load(tmp_path)


def test_weights_that_do_not_fit_are_a_clear_error(folder, weights, tmp_path):
    with pytest.raises(VictimError, match="does not fit squeezenet1_1"):
        source(folder, weights, classes=5).network(tmp_path)
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VictimError, match="not a file of weights"):
        source(folder, tmp_path / "cut.pt").network(tmp_path)


def test_a_damaged_image_is_a_clear_error(tmp_path):
    images = fill(tmp_path / "images", ["ant", "bee", "cow"], 5, 0)
    for path in images.glob("ant/*.png"):
        path.write_bytes(b"no image" + path.read_bytes()[20:])
    with pytest.raises(VictimError, match="not a readable image"):
        source(images).load(tmp_path)


def test_folders_named_by_the_classes_need_not_be_all_of_them(tmp_path):
    images = fill(tmp_path / "images", ["goldfish", "tench"], 2, 0)
    sizes = {"defender_images": 1, "attacker_images": 1, "judge_images": 2}
    victim = Torchvision(model="squeezenet1_1", weights="none", folder=images, **sizes).load(tmp_path)
    assert {*victim.judge.targets.tolist(), *victim.attacker.targets.tolist()} <= {0, 1}
    assert victim.task.classes == 1000
