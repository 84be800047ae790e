"""Images in files: class folders in an order that is no surprise, and each image read, or refused by name."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deepenc.errors import VictimError
from deepenc.network.guard import first_line

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What images are called; those of torchvision's `ImageFolder`."""
_CLUTTER = (".", "__MACOSX", "@eaDir")
"""What the names of files and folders that systems leave among a user's begin with."""


def content(path: Path) -> bytes:
    """SHA-256 of a file.

    Raises:
        VictimError: It is no regular file, or cannot be read.
    """
    expect_file(path, "an image")
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise VictimError(f"cannot read {path} ({error.strerror}); make it readable, or remove it") from error


def expect_file(path: Path, what: str) -> None:
    """See that a path leads to a regular file: reading a pipe or a device may never end.

    Raises:
        VictimError: It does not; says what is there instead.
    """
    try:
        if path.is_file():
            return
        kinds = {
            "a folder": path.is_dir(),
            "a pipe or device": path.exists(),
            "a broken link": path.is_symlink(),
        }
    except OSError as error:  # such as a folder that may not be looked into
        kinds = {f"unreadable ({error.strerror})": True}
    got = next((kind for kind, true in kinds.items() if true), "missing")
    raise VictimError(f"{path} is {got}, not {what}; restore or remove it, or give another path")


def opened(path: Path) -> Image.Image:
    """An image as 8-bit RGB.

    Grey images of 16 bits keep their upper 8, as Pillow does with coloured ones; transparency is left out.

    Raises:
        VictimError: It is no readable image, or has more pixels than Pillow allows, or has values of no known
            range.
    """
    expect_file(path, "an image")
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(
                    f"its 32-bit values (mode {image.mode}) have no known range, save 8 or 16 bits"
                )
            if "transparency" in image.info:  # Pillow warns of palettes with transparency
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever damaged data lead them to
        raise VictimError(
            f"{path} is not a readable image ({type(error).__name__}: {first_line(error)}); remove or "
            "replace it"
        ) from error


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder with one folder a class, by the classes' names, in the classes' order.

    Folders that are called by numbers are in the order of these, others in that of the alphabet. Hidden files
    and folders are left out.

    Raises:
        VictimError: There are no class folders, or one has no images, or their order is not clear.
    """
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not _clutter(entry.name)]
    except OSError as error:
        raise VictimError(
            f"no folder with one folder of images a class at {folder} ({error.strerror}); give another path"
        ) from error
    if not names:
        raise VictimError(
            f"{folder} has no class folders; expected one folder of images a class, such as {folder}/cat"
        )
    found = {name: sorted(_images(folder / name)) for name in _ordered(names, folder)}
    if empty := [name for name, paths in found.items() if not paths]:
        raise VictimError(
            f"no images in {folder / empty[0]}; remove that folder, or put images of its class there "
            f"({', '.join(SUFFIXES)})"
        )
    return found


def _clutter(name: str) -> bool:
    return name.startswith(_CLUTTER)


def _images(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _clutter(name)]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not _clutter(name):
                yield Path(parent, name)


def _ordered(names: Sequence[str], folder: Path) -> list[str]:
    """Class folders in the order of the classes.

    Raises:
        VictimError: Two names are the same number, or names with numbers in them sort differently as text.
    """
    as_text = sorted(names)
    by_number = sorted(names, key=lambda name: ([_numbers(name)], name))
    if not all(name.isascii() and name.isdecimal() for name in names):
        if as_text != by_number:
            one, two = next(pair for pair in zip(as_text, by_number, strict=True) if pair[0] != pair[1])
            raise VictimError(
                f"the order of the class folders in {folder} is not clear: sorted as text {one!r} comes "
                f"where by the numbers {two!r} would; write all numbers with as many digits (07, 12)"
            )
        return as_text
    values = [int(name) for name in by_number]
    if len(set(values)) < len(values):
        twice = next(name for name, value in zip(by_number, values, strict=True) if values.count(value) > 1)
        raise VictimError(f"two class folders in {folder} have the number {int(twice)}; rename or join them")
    if as_text != by_number:
        log.warning(
            "%s: classes are in the order of the folders' numbers (2 before 10); a network trained with "
            "torchvision's ImageFolder has them in the order of text",
            folder,
        )
    return by_number


def _numbers(name: str) -> list[str | int]:
    """Text and numbers of a name, in turn, so that two names can be compared."""
    return [int(part) if at % 2 else part for at, part in enumerate(re.split(r"([0-9]+)", name))]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in files with their classes, decoded when they are asked for.

    Args:
        paths: Of the images.
        labels: The class of each, from 0.
        transform: Makes an 8-bit RGB image an input.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[int], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.paths, self.labels, self.transform = list(paths), list(labels), transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An input and its class; raises a VictimError where the file holds no image."""
        return self.transform(opened(self.paths[index])), self.labels[index]

    def digest(self, index: int) -> bytes:
        """SHA-256 of the file."""
        return content(self.paths[index])


def image_folder(folder: Path, transform: Callable[[Image.Image], Tensor]) -> ImageFiles:
    """The images of a folder with one folder a class.

    Raises:
        VictimError: See `class_folders`.
    """
    found = class_folders(folder)
    pairs = [(path, label) for label, paths in enumerate(found.values()) for path in paths]
    return ImageFiles([path for path, _ in pairs], [label for _, label in pairs], transform)


def preparing(
    size: int, mean: Sequence[float], deviation: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """How images usually become inputs: the short side resized, the middle cut out, channels normalised.

    Args:
        size: Side of the square that is cut out, in pixels; the short side is resized to 8/7 of it.
        mean: Of each channel, for values in [0, 1].
        deviation: Of each channel.
    """
    from torchvision import transforms

    made: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.Resize(round(size * 8 / 7)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(list(mean), list(deviation)),
        ]
    )
    return made
