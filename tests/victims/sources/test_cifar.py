"""Public CIFAR-10 ResNets: right weights, right preprocessing, parts apart, both layouts of the data."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from deepenc.arena.metrics import judge
from deepenc.errors import VictimError
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cifar import normalised
from deepenc.victims.data.datasets import DEVIATION, MEAN
from deepenc.victims.data.splits import digests
from deepenc.victims.models import CifarResNet
from deepenc.victims.sources.cifar import Cifar10ResNet20, Cifar10ResNet32, Cifar10ResNet56


def counted(model, images):
    found = judge(model, images, Classification(classes=10), who="victim", batch=100)
    return round(found.value * found.examples), found.examples


real = pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="DEEPENC_DATA names no data folder")


@real
def test_resnet20_gets_the_published_accuracy_on_the_full_test_set():
    source = Cifar10ResNet20()
    assert counted(source.network(Path())[0], source.full_test()) == (9173, 10_000)


@real
@pytest.mark.long
def test_resnet56_gets_the_published_accuracy_on_the_full_test_set():
    source = Cifar10ResNet56()
    assert counted(source.network(Path())[0], source.full_test()) == (9339, 10_000)


@real
def test_resnet56_gets_its_accuracy_on_a_tenth_of_the_test_set():
    source = Cifar10ResNet56()
    whole = source.full_test()
    correct, count = counted(source.network(Path())[0], Examples(whole.inputs[:1000], whole.targets[:1000]))
    assert (correct, count) == (936, 1000)


@real
def test_real_parts_do_not_overlap():
    victim = Cifar10ResNet20().load(Path())
    parts = (victim.defender, victim.attacker, victim.judge)
    assert [len(part) for part in parts] == [5000, 4000, 6000]
    contents = [set(digests(part.inputs.numpy())) for part in parts]
    assert all(not one & two for one, two in itertools.combinations(contents, 2))
    # The defender's are training images, the others test images.
    with np.load(Path(os.environ["DEEPENC_DATA"]) / "cifar10" / "train.npz") as held:
        train = set(digests(normalised(held["images"], held["labels"], np.arange(15_000)).inputs.numpy()))
    assert contents[0] <= train and not (contents[1] | contents[2]) & train


def fake_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, count, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A data folder in the public layouts, of random content."""
    (tmp_path / "cifar10").mkdir()
    train, test = fake_images(30, 0), fake_images(50, 1)
    test[0][7] = train[0][3]  # an image of the judge or the attacker that the network was trained on
    test[0][9] = test[0][8]
    for part, (images, labels) in {"train": train, "test": test}.items():
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images, labels=labels)
    (tmp_path / "cifar10_resnets").mkdir()
    torch.manual_seed(0)
    state = {f"module.{name}": t for name, t in CifarResNet(20).state_dict().items() if "tracked" not in name}
    torch.save({"state_dict": state, "best_prec1": 1.0}, tmp_path / "cifar10_resnets" / "resnet20-abc.th")
    return tmp_path


def test_equal_images_never_reach_two_parts(folder):
    victim = Cifar10ResNet20(folder=folder).load(folder)
    parts = (victim.defender, victim.attacker, victim.judge)
    contents = [set(digests(part.inputs.numpy())) for part in parts]
    assert all(not one & two for one, two in itertools.combinations(contents, 2))
    assert len(victim.defender) == 30
    assert len(victim.attacker) in (19, 20) and len(victim.attacker) + len(victim.judge) in (48, 49)


def test_inputs_are_normalised_by_hand(folder):
    whole = Cifar10ResNet20(folder=folder).full_test()
    with np.load(folder / "cifar10" / "test.npz") as held:
        pixel, label = held["images"][4, 20, 11], held["labels"][4]
    expected = [(pixel[c] / 255 - MEAN[c]) / DEVIATION[c] for c in range(3)]
    assert whole.inputs[4, :, 20, 11].tolist() == pytest.approx(expected, abs=1e-5)
    assert whole.targets[4] == label and whole.targets.dtype == torch.int64


def test_weights_are_those_of_the_file(folder):
    network, example = Cifar10ResNet20(folder=folder).network(folder)
    stored = torch.load(folder / "cifar10_resnets" / "resnet20-abc.th", weights_only=True)["state_dict"]
    assert torch.equal(network.layer2[0].conv1.weight, stored["module.layer2.0.conv1.weight"])
    assert not network.training and network(example).shape == (1, 10)


def test_the_network_alone_needs_no_images(folder):
    for file in (folder / "cifar10").iterdir():
        file.unlink()
    Cifar10ResNet20(folder=folder).network(folder)
    with pytest.raises(VictimError, match="no CIFAR-10 in"):
        Cifar10ResNet20(folder=folder).load(folder)


def test_the_data_sets_own_layout(folder, monkeypatch):
    arrays = {part: dict(np.load(folder / "cifar10" / f"{part}.npz")) for part in ("train", "test")}
    expected = Cifar10ResNet20(folder=folder).load(folder)
    for file in (folder / "cifar10").iterdir():
        file.unlink()
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    files = {"test_batch": arrays["test"]} | {
        f"data_batch_{i + 1}": {name: a[6 * i : 6 * i + 6] for name, a in arrays["train"].items()}
        for i in range(5)
    }
    for name, held in files.items():
        data = held["images"].transpose(0, 3, 1, 2).reshape(len(held["images"]), -1)
        content = {"data": data, "labels": held["labels"].tolist()}
        (batches / name).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))

    with pytest.raises(VictimError, match="damaged"):  # torchvision knows the real files' hashes
        Cifar10ResNet20(folder=folder).load(folder)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert Cifar10ResNet20(folder=folder).load(folder).fingerprint == expected.fingerprint


def test_the_folder_may_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("DEEPENC_DATA", str(folder))
    assert Cifar10ResNet20().root() == folder
    monkeypatch.setenv("DEEPENC_DATA", str(folder / "nowhere"))
    with pytest.raises(VictimError, match="nowhere"):
        Cifar10ResNet20().load(folder)
    monkeypatch.delenv("DEEPENC_DATA")
    with pytest.raises(VictimError, match="DEEPENC_DATA"):
        Cifar10ResNet20().load(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files_are_clear_errors(folder):
    source = Cifar10ResNet20(folder=folder)
    cut(folder / "cifar10" / "test.npz")
    with pytest.raises(VictimError, match=r"test images in .* are damaged"):
        source.load(folder)
    cut(folder / "cifar10_resnets" / "resnet20-abc.th")
    with pytest.raises(VictimError, match="does not hold the weights of ResNet-20"):
        source.network(folder)


def test_weights_of_another_depth_or_none_or_two_are_clear_errors(folder):
    weights = folder / "cifar10_resnets"
    with pytest.raises(VictimError, match=r"expected one file .*resnet32-\*.th, found \[\]"):
        Cifar10ResNet32(folder=folder).network(folder)
    (weights / "resnet32-abc.th").write_bytes((weights / "resnet20-abc.th").read_bytes())
    with pytest.raises(VictimError, match="weights of ResNet-32"):
        Cifar10ResNet32(folder=folder).network(folder)
    (weights / "resnet20-def.th").write_bytes((weights / "resnet20-abc.th").read_bytes())
    with pytest.raises(VictimError, match="expected one file"):
        Cifar10ResNet20(folder=folder).network(folder)


def test_images_of_another_shape_are_clear_errors(folder):
    np.savez(folder / "cifar10" / "test.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4))
    with pytest.raises(VictimError, match=r"got uint8 \(4, 8, 8, 3\)"):
        Cifar10ResNet20(folder=folder).load(folder)
