"""CUB-200-2011, FGVC-Aircraft and CIFAR-100 from small folders in exactly their layouts."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100, FGVCAircraft

from deepenc.errors import VictimError
from deepenc.victims.data import datasets
from deepenc.victims.data.cifar import cifar100, normalised
from deepenc.victims.data.datasets import DEVIATION, MEAN, aircraft, cub, mapped, order
from deepenc.victims.data.splits import split

SIZES = [(300, 260), (260, 300), (40, 500), (500, 31), (256, 256), (224, 224), (1, 1)]


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    shape = (height, width) if mode == "L" else (height, width, {"RGB": 3, "RGBA": 4}[mode])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data folder with both data sets; three classes, odd sizes, some pictures grey."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    lines: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number in range(1, 13):
        label = (number - 1) % 3
        path = f"{names[label]}/{names[label][4:]}_{number:04}_99.jpg"
        file = folder / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, "L" if number in (2, 7) else "RGB").save(file)
        lines["images"].append(f"{number} {path}")
        lines["image_class_labels"].append(f"{number} {label + 1}")
        lines["train_test_split"].append(f"{number} {int(number <= 7)}")
    lines["classes"] = [f"{i + 1} {name}" for i, name in enumerate(names)]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")

    folder = root / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    variants = ["707-320", "Boeing 717", "Yak-42"]
    listed: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(9):
        image = f"{1000000 + 7 * number}"
        picture(50 + number, "L" if number == 3 else "RGB").save(folder / "images" / f"{image}.jpg")
        listed[["train", "val", "test"][number // 3]].append(f"{image} {variants[number % 3]}")
    listed["trainval"] = listed["train"] + listed["val"]
    (folder / "variants.txt").write_text("\n".join(variants) + "\n")
    for part, rows in listed.items():
        (folder / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy to damage."""
    shutil.copytree(made, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "not there yet"


def plain(path: Path) -> torch.Tensor:
    """Shorter side to 256, the middle 224, mean and deviation: without torchvision."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(256 * width / short), int(256 * height / short)), Image.Resampling.BILINEAR)
    left, top = (round((side - 224) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / DEVIATION).permute(2, 0, 1).float()


def found(dataset):
    """Label and part of every input that is told apart by its bytes."""
    rows = {}
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        for row, label in zip(images.inputs, images.targets.tolist(), strict=True):
            rows[row.numpy().tobytes()] = (label, part)
    return rows


def close_to(rows, expected: torch.Tensor):
    """The row nearest to an image that was prepared another way, which may round pixels otherwise."""
    best = min(
        rows,
        key=lambda r: (
            (torch.frombuffer(bytearray(r), dtype=torch.float32).view(3, 224, 224) - expected).abs().mean()
        ),
    )
    gap = (torch.frombuffer(bytearray(best), dtype=torch.float32).view(3, 224, 224) - expected).abs().max()
    assert gap < 0.02 / min(DEVIATION)
    return rows[best]


def test_cub_has_the_images_labels_and_parts_of_its_listings(made, cache):
    dataset = cub(made, cache)
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (3, 7, 5)
    assert dataset.train.inputs.shape == (7, 3, 224, 224) and dataset.train.inputs.dtype == torch.float32
    rows = found(dataset)
    for number in range(1, 13):
        (path,) = (made / "CUB_200_2011" / "images").glob(f"*/*_{number:04}_99.jpg")
        assert close_to(rows, plain(path)) == ((number - 1) % 3, "train" if number <= 7 else "test")


def test_aircraft_is_what_torchvision_reads(made, cache):
    dataset = aircraft(made, cache)
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (3, 6, 3)
    rows = found(dataset)
    for part, split_name in (("train", "trainval"), ("test", "test")):
        reference = FGVCAircraft(str(made), split=split_name, annotation_level="variant", download=False)
        assert len(reference) == len(getattr(dataset, part))
        for path, label in zip(reference._image_files, reference._labels, strict=True):
            assert close_to(rows, plain(path)) == (label, part)


def test_the_second_time_nothing_is_decoded(made, cache, monkeypatch):
    first = cub(made, cache)
    monkeypatch.setattr(datasets, "_write", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
    again = cub(made, cache)
    assert again.fingerprint == first.fingerprint and again.train_ids == first.train_ids
    assert torch.equal(again.test.inputs, first.test.inputs)


def test_images_are_mapped_and_changes_to_them_stay_in_memory(made, cache):
    dataset = cub(made, cache)
    (file,) = [path for path in cache.glob("cub-*.npy") if "ids" not in path.name]
    assert isinstance(mapped(file, (12, 3, 224, 224), np.float32, lambda _: pytest.fail("made")), np.memmap)
    before = file.read_bytes()
    part = dataset.train.inputs[2:4]
    assert part.untyped_storage().data_ptr() == dataset.test.inputs.untyped_storage().data_ptr()
    kept = part.clone()
    part.fill_(9)
    assert file.read_bytes() == before
    assert torch.equal(cub(made, cache).train.inputs[2:4], kept)


def test_parts_of_the_training_part_are_slices(made, cache):
    dataset = cub(made, cache)
    assert list(dataset.train_ids) == sorted(dataset.train_ids)
    parts = split(dataset.train_ids, (3, 4))
    assert np.concatenate(parts).tolist() == list(range(7))


@pytest.mark.parametrize("damage", ["cut", "emptied", "another"])
def test_a_damaged_cache_is_made_again(made, cache, tmp_path, caplog, damage):
    expected = cub(made, cache)
    for file in cache.iterdir():
        content = file.read_bytes()
        if damage == "another":
            np.save(tmp_path / file.name, np.zeros((2, 2)))
        else:
            (tmp_path / file.name).write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        dataset = cub(made, tmp_path)
    assert "made again" in caplog.text
    assert torch.equal(dataset.train.inputs, expected.train.inputs)
    assert dataset.fingerprint == expected.fingerprint


def test_a_cache_that_cannot_be_written_is_a_clear_error(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VictimError, match="another cache folder"):
        cub(made, tmp_path / "file")


def test_nothing_half_written_is_left_behind(tmp_path):
    def failing(row):
        if row:
            raise KeyboardInterrupt
        return np.zeros(4)

    with pytest.raises(KeyboardInterrupt):
        mapped(tmp_path / "x.npy", (3, 4), np.float32, failing)
    assert not list(tmp_path.iterdir())
    assert mapped(tmp_path / "x.npy", (3, 4), np.float32, lambda row: np.full(4, row))[2, 1] == 2
    assert np.load(tmp_path / "x.npy")[:, 0].tolist() == [0, 1, 2]


def test_a_changed_image_or_label_is_another_data_set(root, cache, made):
    prints = {cub(made, cache).fingerprint}
    labels = root / "CUB_200_2011" / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("1 1\n", "1 2\n", 1))
    prints.add(cub(root, cache).fingerprint)
    (first,) = (root / "CUB_200_2011" / "images").glob("*/*_0001_99.jpg")
    picture(99).save(first)
    dataset = cub(root, cache)
    prints.add(dataset.fingerprint)
    assert len(prints) == 3
    assert close_to(found(dataset), plain(first)) == (1, "train")


def test_an_image_that_is_replaced_by_one_of_the_same_size_is_decoded_again(root, cache):
    (path,) = (root / "CUB_200_2011" / "images").glob("*/*_0003_99.jpg")
    before, size, times = cub(root, cache), path.stat().st_size, path.stat()
    picture(98).resize((8, 8)).save(path)
    assert path.stat().st_size < size
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = cub(root, cache)
    assert path.stat().st_size == size and after.fingerprint != before.fingerprint
    assert close_to(found(after), plain(path)) == (2, "train")


def test_test_images_that_are_training_images_too_are_left_out(root, tmp_path):
    folder = root / "CUB_200_2011" / "images"
    (one,) = folder.glob("*/*_0001_99.jpg")
    (nine,) = folder.glob("*/*_0009_99.jpg")
    shutil.copyfile(one, nine)
    dataset = cub(root, tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (7, 4)
    rows = [{r.numpy().tobytes() for r in part.inputs} for part in (dataset.train, dataset.test)]
    assert not rows[0] & rows[1]


def test_only_the_first_classes(made, tmp_path):
    dataset = cub(made, tmp_path, 2)
    assert dataset.classes == 2
    assert {*dataset.train.targets.tolist(), *dataset.test.targets.tolist()} == {0, 1}
    with pytest.raises(VictimError, match="has 3 classes, got 4"):
        cub(made, tmp_path, 4)


def test_without_names_the_labels_tell_how_many_classes(root, tmp_path):
    (root / "CUB_200_2011" / "classes.txt").unlink()
    assert cub(root, tmp_path).classes == 3


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("image_class_labels.txt", "5 2\n", "5 4\n", r"image 5: expected a number from 1 to 3, got '4'"),
        ("image_class_labels.txt", "5 2\n", "5 0\n", r"image 5: expected a number from 1 to 3, got '0'"),
        ("image_class_labels.txt", "5 2\n", "5 -1\n", "got '-1'"),
        ("image_class_labels.txt", "5 2\n", "", r"1 are in one only, first \['5'\]"),
        ("image_class_labels.txt", "5 2\n", "5\n", "expected lines `number text`"),
        ("image_class_labels.txt", "5 2\n", "4 2\n", "no number twice, got '4 2'"),
        ("train_test_split.txt", "5 1\n", "5 2\n", "from 0 to 1, got '2'"),
        ("train_test_split.txt", "12 0\n", "12 0\n13 0\n", r"first \['13'\]"),
        ("images.txt", "_0003_", "_0333_", r"_0333_99.jpg is missing"),
        ("images.txt", "1 ", "\udc80 ", "cannot read the listing"),
    ],
)
def test_damaged_listings_of_cub(root, tmp_path, file, old, new, message):
    path = root / "CUB_200_2011" / file
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))
    with pytest.raises(VictimError, match=message):
        cub(root, tmp_path / "cache")


@pytest.mark.parametrize(("value", "part"), [("1", "test on"), ("0", "train on")])
def test_a_part_without_images(root, tmp_path, value, part):
    path = root / "CUB_200_2011" / "train_test_split.txt"
    path.write_text("".join(f"{number} {value}\n" for number in range(1, 13)))
    with pytest.raises(VictimError, match=f"lists no images to {part}"):
        cub(root, tmp_path)


def test_test_images_that_are_all_training_images(root, tmp_path):
    files = sorted((root / "CUB_200_2011" / "images").glob("*/*.jpg"))
    for file in files[1:]:
        shutil.copyfile(files[0], file)
    with pytest.raises(VictimError, match="every test image"):
        cub(root, tmp_path)


@pytest.mark.parametrize(
    ("load", "folder", "names"),
    [
        (cub, "CUB_200_2011", ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images")),
        (
            aircraft,
            "fgvc-aircraft-2013b/data",
            ("variants.txt", "images_variant_trainval.txt", "images_variant_test.txt", "images"),
        ),
    ],
)
def test_what_is_missing_is_named(root, tmp_path, load, folder, names):
    for name in names:
        (root / folder / name).rename(root / "aside")
        with pytest.raises(VictimError, match=rf"{folder}: expected {name} there; unpack"):
            load(root, tmp_path / "cache")
        (root / "aside").rename(root / folder / name)
    with pytest.raises(VictimError, match=f"expected {', '.join(names)} there"):
        load(tmp_path, tmp_path / "cache")


def test_damaged_listings_of_aircraft(root, tmp_path):
    folder = root / "fgvc-aircraft-2013b" / "data"
    path = folder / "images_variant_test.txt"
    text = path.read_text()
    path.write_text(text.replace("Boeing 717", "Boeing 718"))
    with pytest.raises(VictimError, match=r"variant 'Boeing 718', which is not in variants\.txt"):
        aircraft(root, tmp_path / "cache")
    path.write_text("1234567 Yak-42\n")
    with pytest.raises(VictimError, match=r"1234567\.jpg is missing"):
        aircraft(root, tmp_path / "cache")
    path.write_text("")
    with pytest.raises(VictimError, match="no images to test on"):
        aircraft(root, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_unreadable_image_is_named(root, tmp_path, content):
    (path,) = (root / "CUB_200_2011" / "images").glob("*/*_0004_99.jpg")
    path.write_bytes(path.read_bytes()[:400] if content is None else content)
    with pytest.raises(VictimError, match=r"_0004_99\.jpg is not a readable image"):
        cub(root, tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").iterdir() if "ids" not in file.name]


def test_order_by_hand():
    train, test = order([b"d", b"b", b"a", b"b", b"c", b"e"], [True, True, False, False, False, True])
    assert train.tolist() == [1, 0, 5] and test.tolist() == [2, 4]


# CIFAR-100


@pytest.fixture
def hundred(tmp_path):
    """A data folder with 120 + 60 images of random content; two images of both parts."""
    rng = np.random.default_rng(0)
    arrays = {
        part: {
            "images": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            "labels": (np.arange(count) * 7 % 100).astype(np.uint8),
        }
        for part, count in (("train", 120), ("test", 60))
    }
    arrays["test"]["images"][[4, 9]] = arrays["train"]["images"][[0, 1]]
    (tmp_path / "cifar100").mkdir()
    for part, held in arrays.items():
        np.savez(tmp_path / "cifar100" / f"{part}.npz", **held)
    return tmp_path, arrays


def test_cifar100_has_all_images_with_their_labels_and_none_in_both_parts(hundred):
    root, arrays = hundred
    dataset = cifar100(root, root)
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (100, 120, 58)
    rows = found(dataset)
    assert len(rows) == 178
    for part, left_out in (("train", ()), ("test", (4, 9))):
        held = arrays[part]
        plain_part = normalised(
            held["images"], held["labels"].astype(np.int64), np.arange(len(held["labels"]))
        )
        for i, (row, label) in enumerate(zip(plain_part.inputs, plain_part.targets.tolist(), strict=True)):
            if i not in left_out:
                assert rows[row.numpy().tobytes()] == (label, part)
    parts = split(dataset.train_ids, (80, 40))
    assert np.concatenate(parts).tolist() == list(range(120))


def test_only_the_first_classes_of_cifar100(hundred):
    root, _ = hundred
    dataset = cifar100(root, root, 10)
    assert dataset.classes == 10 and len(dataset.train) == 13  # 0 to 9 once each, then 0, 7, 5 again
    assert max(*dataset.train.targets.tolist(), *dataset.test.targets.tolist()) == 9
    with pytest.raises(VictimError, match="has 100 classes, got 101"):
        cifar100(root, root, 101)


def test_cifar100s_own_layout(hundred, monkeypatch):
    root, arrays = hundred
    expected = cifar100(root, root)
    shutil.rmtree(root / "cifar100")
    folder = root / "cifar-100-python"
    folder.mkdir()
    for part, held in arrays.items():
        data = held["images"].transpose(0, 3, 1, 2).reshape(len(held["images"]), -1)
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": held["labels"].tolist()}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    with pytest.raises(
        VictimError, match=r"CIFAR-100 train images .* damaged"
    ):  # torchvision knows the hashes
        cifar100(root, root)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    assert cifar100(root, root).fingerprint == expected.fingerprint


def test_unusable_cifar100(hundred):
    root, arrays = hundred
    file = root / "cifar100" / "test.npz"
    np.savez(file, images=arrays["test"]["images"], labels=arrays["test"]["labels"] + 30)
    with pytest.raises(VictimError, match=r"labels in \[0, 100\), got 0 to 129"):
        cifar100(root, root)
    np.savez(file, images=arrays["test"]["images"][:0], labels=arrays["test"]["labels"][:0])
    with pytest.raises(VictimError, match="120 to train and 0 to test"):
        cifar100(root, root)
    file.unlink()
    with pytest.raises(
        VictimError, match=r"no CIFAR-100 in .*test\.npz or .*cifar-100-python; unpack cifar-100"
    ):
        cifar100(root, root)


def test_parts_are_disjoint_where_images_repeat(hundred):
    root, _ = hundred
    dataset = cifar100(root, root)
    rows = [{r.numpy().tobytes() for r in part.inputs} for part in (dataset.train, dataset.test)]
    assert all(not one & two for one, two in itertools.combinations(rows, 2))
