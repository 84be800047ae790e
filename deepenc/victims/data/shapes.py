"""Generated images of squares and discs: a data set to detect things in that needs no files."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepenc.victims.data.pennfudan import Item, boxes_of

SIDE = 64
"""Of the images, in pixels."""
SQUARE, DISC = 1, 2
"""Classes."""


class Shapes(Dataset[Item]):
    """Images of one to three squares and discs on noise, each made anew from its number.

    Shapes are 12 to 28 pixels wide and do not overlap; squares are reddish, discs bluish, by a little.

    Args:
        count: Images.
        first: Number of the first; other numbers are other images.
        masks: Whether targets have masks beside the boxes.
    """

    def __init__(self, count: int, *, first: int = 0, masks: bool = False) -> None:
        self.count, self.first, self.masks = count, first, masks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        """An image with its targets."""
        if not 0 <= index < self.count:
            raise IndexError(f"expected an image in [0, {self.count}), got {index}")
        generator = torch.Generator().manual_seed(self.first + index)
        image = 0.3 + 0.1 * torch.randn(3, SIDE, SIDE, generator=generator)
        masks: list[Tensor] = []
        labels: list[int] = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            label = int(torch.randint(SQUARE, DISC + 1, (), generator=generator))
            mask = _shape(label, generator)
            if any(bool((mask & other).any()) for other in masks):
                continue
            tint = torch.tensor([0.4, 0.25, 0.2] if label == SQUARE else [0.2, 0.25, 0.4])
            image += tint[:, None, None] * mask
            masks.append(mask)
            labels.append(label)
        stacked = torch.stack(masks).to(torch.uint8)
        target = {"boxes": boxes_of(stacked), "labels": torch.tensor(labels)}
        return image.clamp(0, 1), target | ({"masks": stacked} if self.masks else {})

    def digest(self, index: int) -> bytes:
        """SHA-256 of what the image is made from."""
        return hashlib.sha256(f"shapes {self.first + index}".encode()).digest()


def _shape(label: int, generator: torch.Generator) -> Tensor:
    """The pixels of a shape at a random place, ``(SIDE, SIDE)``, bool."""
    width = int(torch.randint(12, 29, (), generator=generator))
    left, top = torch.randint(0, SIDE - width + 1, (2,), generator=generator).tolist()
    x, y = torch.arange(SIDE) - left - (width - 1) / 2, torch.arange(SIDE) - top - (width - 1) / 2
    if label == SQUARE:
        inside: Tensor = (y.abs()[:, None] <= width / 2) & (x.abs() <= width / 2)
    else:
        inside = y.square()[:, None] + x.square() <= (width / 2) ** 2
    return inside
