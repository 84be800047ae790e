"""Penn-Fudan: pedestrians with a mask of each, read from their files when they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.victims.data.images import SUFFIXES, content, expect_file, opened

IMAGES, MASKS = "PNGImages", "PedMasks"
Item = tuple[Tensor, dict[str, Tensor]]
"""An image ``(3, height, width)`` in [0, 1], and its boxes, labels and masks."""


class PennFudan(Dataset[Item]):
    """The images of a folder, in the order of their names; every pedestrian is of class 1.

    Args:
        folder: With ``PNGImages/NAME.png`` (or in another format) and ``PedMasks/NAME_mask.png``: 0 for the
            background, 1, 2, ... for the pedestrians.
        masks: Whether targets have masks beside the boxes.

    Raises:
        VictimError: There are no images, or one has no mask.
    """

    def __init__(self, folder: Path, *, masks: bool = False) -> None:
        self.masks = masks
        try:
            names = sorted((folder / IMAGES).iterdir())
        except OSError as error:
            raise VictimError(
                f"no Penn-Fudan images at {folder / IMAGES} ({error.strerror}); unpack PennFudanPed.zip "
                "(www.cis.upenn.edu/~jshi/ped_html) there, or give its folder"
            ) from error
        self.images = [path for path in names if path.suffix.lower() in SUFFIXES]
        if not self.images:
            raise VictimError(f"no images in {folder / IMAGES}; unpack PennFudanPed.zip again")
        self.drawn = [folder / MASKS / f"{path.stem}_mask.png" for path in self.images]
        for path in self.drawn:
            expect_file(path, "a mask of Penn-Fudan")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        """An image with its targets.

        Raises:
            VictimError: A file is damaged, or the mask is of another size, or shows nobody.
        """
        image, path = opened(self.images[index]), self.drawn[index]
        ids = _instances(path)
        if ids.shape != (image.height, image.width):
            raise VictimError(
                f"{path} has {ids.shape[1]} x {ids.shape[0]} pixels, its image {image.width} x "
                f"{image.height}; get the data set again"
            )
        people = np.unique(ids[ids > 0])
        if not len(people):
            raise VictimError(f"{path} shows no pedestrian; get the data set again, or remove the image")
        masks = torch.from_numpy(ids[None] == people[:, None, None]).to(torch.uint8)
        target = {"boxes": boxes_of(masks), "labels": torch.ones(len(masks), dtype=torch.int64)}
        if self.masks:
            target["masks"] = masks
        return pixels(image), target

    def digest(self, index: int) -> bytes:
        """SHA-256 of the image's file."""
        return content(self.images[index])


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as ``(3, height, width)``, float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def boxes_of(masks: Tensor) -> Tensor:
    """The boxes around masks ``(objects, height, width)``, none empty: left, top, right, bottom."""
    spans = []
    for along in (1, 2):
        there = masks.amax(along) > 0
        first = there.int().argmax(1)
        last = there.shape[1] - there.flip(1).int().argmax(1)
        spans += [(first, last)]
    (left, right), (top, bottom) = spans
    return torch.stack([left, top, right, bottom], dim=1).float()


def _instances(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            ids = np.array(image)
    except Exception as error:  # Pillow's decoders raise whatever damaged data lead them to
        raise VictimError(
            f"{path} is not a readable mask ({type(error).__name__}: {first_line(error)}); get it again"
        ) from error
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise VictimError(f"{path}: expected a mask of one 8-bit channel, got {ids.dtype} {ids.shape}")
    return ids


def mirrored(item: Item) -> Item:
    """An image with its targets, left to right."""
    image, target = item
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[2] - boxes[:, [2, 0]]
    masks = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), target | {"boxes": boxes} | masks
