"""CIFAR-100 as a task: the small one to fine-tune stolen networks on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepenc.errors import VictimError
from deepenc.victims.cifar import normalised, read_images
from deepenc.victims.data import digests
from deepenc.victims.datasets import Dataset, identity, order

CLASSES = 100


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
            "get it anew"
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
    print_of = identity(count, (held[0], own.labels.tolist()), (held[1], judged.labels.tolist()))
    return Dataset("CIFAR-100", count, own, judged, held[0], print_of)
