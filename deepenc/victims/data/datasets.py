"""Data sets with a training and a test part of their own: CUB-200-2011 and FGVC-Aircraft from their files.

At 224 pixels thousands of images do not belong into memory. They are decoded once, into one array in the
cache folder, which is mapped from then on: whoever takes a batch reads that batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from torch import Tensor

from deepenc.errors import VictimError
from deepenc.files import whole_file
from deepenc.tasks.examples import Examples
from deepenc.victims.data.images import content, expect_file, opened
from deepenc.victims.data.splits import Index

log = logging.getLogger(__name__)

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet's images, by which most networks expect theirs normalised."""
RESIZE, CROP = 256, 224
PREPARED = f"resize {RESIZE}, crop {CROP}, mean {MEAN}, deviation {DEVIATION}, float32, 1"
"""How images become inputs; a changed text is another array in the cache."""


def data_folder(given: Path | None, who: str) -> Path:
    """The folder given, or that of the environment variable ``DEEPENC_DATA``.

    Args:
        given: By a configuration.
        who: Needs it, for messages.

    Raises:
        VictimError: None is given, or it does not exist.
    """
    folder = given or os.environ.get("DEEPENC_DATA")
    if not folder:
        raise VictimError(
            f"{who} needs a data folder; give it as `folder` or in the environment variable DEEPENC_DATA"
        )
    if not Path(folder).is_dir():
        raise VictimError(f"{who}: no data folder at {Path(folder).absolute()}")
    return Path(folder)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A task: images to train on, and images to test on that share none with them.

    Both are in the order of the images' contents, which is as good as random; so `data.split` cuts parts
    that are slices, and slices of mapped images take no memory.

    Attributes:
        name: How messages call it.
        classes: Number of classes.
        train: Its training part.
        test: Its test part, without images that are in the training part too.
        train_ids: A hash per image of the training part, ascending.
        fingerprint: Identifies the images and labels (SHA-256, hex).
    """

    name: str
    classes: int
    train: Examples
    test: Examples
    train_ids: tuple[bytes, ...]
    fingerprint: str


@dataclass(frozen=True)
class Entry:
    """A line of a data set's listing.

    Attributes:
        path: Of the image, below the data set's folder of images.
        label: From 0.
        train: Whether it belongs to the training part.
    """

    path: str
    label: int
    train: bool


def cub(root: Path, cache: Path, classes: int | None = None) -> Dataset:
    """CUB-200-2011 from the folder that its archive unpacks to.

    Args:
        root: The data folder, with ``CUB_200_2011/{images.txt, image_class_labels.txt,
            train_test_split.txt, images/}`` in it.
        cache: Folder for the decoded images.
        classes: Take the first so many classes only.

    Raises:
        VictimError: Files are missing, or do not agree with each other.
    """
    folder = root / "CUB_200_2011"
    _expect(
        "CUB-200-2011",
        folder,
        ("images.txt", "image_class_labels.txt", "train_test_split.txt", "images"),
        "unpack CUB_200_2011.tgz of data.caltech.edu/records/65de6-vp158 there",
    )
    paths = _numbered(folder / "images.txt")
    labels = _numbered(folder / "image_class_labels.txt", paths)
    parts = _numbered(folder / "train_test_split.txt", paths)
    names = folder / "classes.txt"
    known = len(_numbered(names)) if names.is_file() else None
    entries = []
    for image, path in paths.items():
        label = _whole(labels[image], folder / "image_class_labels.txt", image, 1, known)
        part = _whole(parts[image], folder / "train_test_split.txt", image, 0, 1)
        entries.append(Entry(path, label - 1, part == 1))
    return _prepared("CUB-200-2011", "cub", folder / "images", entries, cache, classes, known)


def aircraft(root: Path, cache: Path, classes: int | None = None) -> Dataset:
    """FGVC-Aircraft (variants) from the layout of ``torchvision.datasets.FGVCAircraft``.

    Its training and validation images are the training part.

    Args:
        root: The data folder, with ``fgvc-aircraft-2013b/data/{variants.txt, images_variant_trainval.txt,
            images_variant_test.txt, images/}`` in it.
        cache: Folder for the decoded images.
        classes: Take the first so many variants only.

    Raises:
        VictimError: Files are missing, or do not agree with each other.
    """
    from torchvision.datasets import FGVCAircraft

    folder = root / "fgvc-aircraft-2013b" / "data"
    parts = {"trainval": True, "test": False}
    _expect(
        "FGVC-Aircraft",
        folder,
        ("variants.txt", *(f"images_variant_{part}.txt" for part in parts), "images"),
        "unpack fgvc-aircraft-2013b.tar.gz of robots.ox.ac.uk/~vgg/data/fgvc-aircraft there",
    )
    entries = []
    for part, train in parts.items():
        listing = folder / f"images_variant_{part}.txt"
        for path in (folder / "variants.txt", listing):
            expect_file(path, "a listing")
        try:
            listed = FGVCAircraft(str(root), split=part, loader=str)
        except KeyError as error:
            raise VictimError(
                f"{listing}: an image is of the variant {error}, which is not in variants.txt; get the "
                "listings again"
            ) from error
        except (OSError, ValueError) as error:
            raise VictimError(f"cannot read the listing {listing} ({error}); get it again") from error
        entries += [
            Entry(Path(path).name, label, train)
            for path, label in map(listed.__getitem__, range(len(listed)))
        ]
    return _prepared(
        "FGVC-Aircraft", "aircraft", folder / "images", entries, cache, classes, len(listed.classes)
    )


def order(ids: Sequence[bytes], train: Sequence[bool]) -> tuple[Index, Index]:
    """Indices of the training images and of the test images, each in the order of their contents.

    Test images that are also in the training part are left out: a network may have memorised them.
    """
    ranked = sorted(range(len(ids)), key=lambda i: ids[i])
    first = [i for i in ranked if train[i]]
    seen = {ids[i] for i in first}
    second = [i for i in ranked if not train[i] and ids[i] not in seen]
    return np.array(first, dtype=np.int64), np.array(second, dtype=np.int64)


def identity(classes: int, *parts: tuple[Sequence[bytes], Iterable[int]]) -> str:
    """SHA-256 (hex) of the parts of a data set, each its images' hashes and labels."""
    told = [[(content.hex(), int(label)) for content, label in zip(*p, strict=True)] for p in parts]
    return hashlib.sha256(repr((PREPARED, classes, told)).encode()).hexdigest()


def mapped(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, rows: Callable[[int], NDArray[np.generic]]
) -> NDArray[np.generic]:
    """An array in a file, made row by row where the file is missing or damaged, and mapped into memory.

    It is written whole or not at all. Changes to the array that is returned stay in memory.

    Args:
        path: The file; its folder is created where missing.
        shape: Of the array.
        dtype: Of the array.
        rows: Makes one row.

    Raises:
        VictimError: The folder cannot be written to.
    """
    found = _read(path, shape, dtype)
    if found is None:
        try:
            _write(path, shape, dtype, rows)
        except OSError as error:
            raise VictimError(
                f"cannot keep prepared images at {path}: {error}; free "
                f"{np.dtype(dtype).itemsize * int(np.prod(shape)) / 2**30:.1f} GiB there, or choose another "
                "cache folder"
            ) from error
        found = _read(path, shape, dtype)
        assert found is not None
    return found


def _read(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[np.generic] | None:
    if not path.is_file():
        return None
    try:
        found: NDArray[np.generic] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged (%s); made again", path, error)
        return None
    if found.shape != shape or found.dtype != dtype:
        log.warning("%s is not what it is called; made again", path)
        return None
    return found


def _write(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, rows: Callable[[int], NDArray[np.generic]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    # Written, not mapped: on a full disk that is an error, a map would kill the process.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for row in range(shape[0]):
            file.write(np.ascontiguousarray(rows(row), dtype=dtype).data)


def _prepared(
    name: str,
    short: str,
    folder: Path,
    entries: Sequence[Entry],
    cache: Path,
    wanted: int | None,
    known: int | None,
) -> Dataset:
    """The data set of a listing, its images decoded into the cache."""
    classes = known if known is not None else 1 + max((e.label for e in entries), default=0)
    if wanted is not None:
        if wanted > classes:
            raise VictimError(f"{name} in {folder} has {classes} classes, got {wanted} as `classes`")
        classes, entries = wanted, [entry for entry in entries if entry.label < wanted]
    for part, kind in (("train on", True), ("test on", False)):
        if not any(entry.train == kind for entry in entries):
            raise VictimError(f"{name} in {folder} lists no images to {part}; get its listings again")
    contents = [content(folder / entry.path) for entry in entries]
    train, test = order(contents, [entry.train for entry in entries])
    if not len(test):
        raise VictimError(f"every test image of {name} in {folder} is a training image too; get it again")
    chosen = [entries[i] for i in (*train, *test)]
    # By what the files hold, so that a changed image is decoded again.
    told = [PREPARED, *(contents[i].hex() for i in (*train, *test))]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    shape = (len(chosen), 3, CROP, CROP)
    pixels = mapped(cache / f"{short}-{key}.npy", shape, np.float32, _decoder(folder, chosen))
    inputs = torch.from_numpy(pixels)
    labels = torch.tensor([entry.label for entry in chosen], dtype=torch.int64)
    cut = len(train)
    held = tuple(contents[i] for i in train), tuple(contents[i] for i in test)
    return Dataset(
        name,
        classes,
        Examples(inputs[:cut], labels[:cut]),
        Examples(inputs[cut:], labels[cut:]),
        held[0],
        identity(classes, (held[0], labels[:cut].tolist()), (held[1], labels[cut:].tolist())),
    )


def _decoder(folder: Path, entries: Sequence[Entry]) -> Callable[[int], NDArray[np.float32]]:
    from torchvision import transforms

    prepare: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.Resize(RESIZE),
            transforms.CenterCrop(CROP),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )

    def decoded(row: int) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = prepare(opened(folder / entries[row].path)).numpy()
        return pixels

    return decoded


def _expect(name: str, folder: Path, parts: Sequence[str], remedy: str) -> None:
    if missing := [part for part in parts if not (folder / part).exists()]:
        raise VictimError(f"no {name} in {folder}: expected {', '.join(missing)} there; {remedy}")


def _lines(path: Path) -> list[str]:
    expect_file(path, "a listing")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VictimError(f"cannot read the listing {path} ({error}); get it again") from error


def _numbered(path: Path, images: Mapping[str, str] | None = None) -> dict[str, str]:
    """Lines ``number text`` of a listing; of exactly the given images, where they are given."""
    found: dict[str, str] = {}
    for line in _lines(path):
        number, _, text = line.partition(" ")
        if not text or number in found:
            raise VictimError(f"{path}: expected lines `number text`, no number twice, got {line!r}")
        found[number] = text
    if images is not None and (odd := sorted(images.keys() ^ found.keys())):
        raise VictimError(
            f"{path} and images.txt are not of the same images: {len(odd)} are in one only, first "
            f"{odd[:3]}; get the listings again"
        )
    return found


def _whole(text: str, path: Path, image: str, least: int, most: int | None) -> int:
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        upper = "" if most is None else f" to {most}"
        raise VictimError(f"{path}: image {image}: expected a number from {least}{upper}, got {text!r}")
    return int(text)
