"""The images of CIFAR-10 and CIFAR-100, and CIFAR-100 as a small task to fine-tune stolen networks on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.examples import Examples
from deepenc.victims.data.datasets import DEVIATION, MEAN, Dataset, identity, order
from deepenc.victims.data.splits import digests

CLASSES = 100
LAYOUTS = {"CIFAR10": ("cifar10", "cifar-10-batches-py"), "CIFAR100": ("cifar100", "cifar-100-python")}
"""Folders of the data sets, by torchvision's name: of the arrays, and as they are published."""
Raw = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images ``(images, 32, 32, 3)`` and labels ``(images,)``."""


def cifar100(root: Path, cache: Path, classes: int | None = None) -> Dataset:
    """CIFAR-100, in memory; inputs as those of CIFAR-10's networks.

    Args:
        root: The data folder, with ``cifar100/{train,test}.npz`` or the data set's own ``cifar-100-python/``
            in it.
        cache: Not used.
        classes: Take the first so many classes only.

    Raises:
        VictimError: The images are missing or unusable.
    """
    train, test = (read_images(root, part, "CIFAR100") for part in ("train", "test"))
    images = np.concatenate((train[0], test[0]))
    labels = np.concatenate((train[1], test[1]))
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise VictimError(
            f"CIFAR-100 in {root}: expected labels in [0, {CLASSES}), got {labels.min()} to {labels.max()}; "
            "get it again"
        )
    count = CLASSES if classes is None else classes
    if count > CLASSES:
        raise VictimError(f"CIFAR-100 has {CLASSES} classes, got {count} as `classes`")
    training = np.arange(len(labels)) < len(train[1])
    chosen = np.flatnonzero(labels < count)
    ids = digests(images[chosen])
    parts = [chosen[part] for part in order(ids, training[chosen].tolist())]
    if not all(map(len, parts)):
        sizes = [len(part) for part in parts]
        raise VictimError(
            f"expected CIFAR-100 images in {root}, got {sizes[0]} to train and {sizes[1]} to test"
        )
    own, judged = (normalised(images, labels, part) for part in parts)
    by_index = dict(zip(chosen.tolist(), ids, strict=True))
    held = [tuple(by_index[i] for i in part.tolist()) for part in parts]
    print_of = identity(count, (held[0], own.targets.tolist()), (held[1], judged.targets.tolist()))
    return Dataset("CIFAR-100", count, own, judged, held[0], print_of)


def read_images(root: Path, part: str, data: str = "CIFAR10") -> Raw:
    """The images of CIFAR-10 or CIFAR-100, from either layout.

    Args:
        root: The data folder.
        part: ``"train"`` or ``"test"``.
        data: ``"CIFAR10"`` or ``"CIFAR100"``.

    Raises:
        VictimError: They are missing or unusable.
    """
    arrays, published = LAYOUTS[data]
    archive, batches, called = root / arrays / f"{part}.npz", root / published, data.replace("R", "R-")
    try:
        if archive.is_file():
            with archive.open("rb") as file, np.load(file, allow_pickle=False) as held:
                images, labels = held["images"], held["labels"].astype(np.int64)
        elif batches.is_dir():
            from torchvision import datasets

            found = getattr(datasets, data)(str(root), train=part == "train", download=False)
            images, labels = found.data, np.array(found.targets, dtype=np.int64)
        else:
            raise VictimError(
                f"no {called} in {root}: expected {archive} or {batches}; unpack "
                f"{called.lower()}-python.tar.gz of cs.toronto.edu/~kriz/cifar.html there"
            )
    except VictimError:
        raise
    except Exception as error:  # numpy and zip raise whatever damaged bytes lead them to
        raise VictimError(
            f"the {called} {part} images in {root} are damaged ({type(error).__name__}: "
            f"{first_line(error)}); get them again"
        ) from error
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise VictimError(
            f"expected uint8 images (N, 32, 32, 3) with N labels in {root}, "
            f"got {images.dtype} {images.shape} with {labels.shape}"
        )
    return images, labels


def normalised(images: NDArray[np.uint8], labels: NDArray[np.int64], index: NDArray[np.int64]) -> Examples:
    """Chosen images as the networks take them: ``(images, 3, 32, 32)``, float32."""
    pixels = torch.from_numpy(images[index]).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return Examples(((pixels - mean) / deviation).contiguous(), torch.from_numpy(labels[index]))
