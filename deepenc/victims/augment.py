"""Random changes of images that leave their class as it is."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted(inputs: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Move each image by its own random offset, up to a fraction of its size.

    Args:
        inputs: ``(images, channels, height, width)``; other shapes are left as they are.
        fraction: In [0, 1).
        generator: On the CPU.
    """
    if inputs.ndim != 4 or fraction == 0:
        return inputs
    count, _, height, width = inputs.shape

    def moved(size: int) -> Tensor:
        reach = round(fraction * size)
        offsets = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
        return (torch.arange(size) + offsets).clamp(0, size - 1).to(inputs.device)

    rows, columns = moved(height), moved(width)
    image = torch.arange(count, device=inputs.device)
    # Advanced indices around the channel slice bring the channels to the end.
    return inputs[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def flipped(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        inputs: ``(images, channels, height, width)``; other shapes are left as they are.
        generator: On the CPU.
    """
    if inputs.ndim != 4:
        return inputs
    coins = torch.rand(len(inputs), generator=generator) < 0.5
    return torch.where(coins.to(inputs.device)[:, None, None, None], inputs.flip(-1), inputs)


def cropped(inputs: Tensor, least: float) -> Tensor:
    """Cut a random rectangle out of each image and resize it to the image's size.

    Draws from torch's global generator, as torchvision does.

    Args:
        inputs: ``(images, channels, height, width)``; other shapes are left as they are.
        least: Smallest area of the rectangle, as a fraction of the image's, in [0, 1]; 0 cuts nothing.
    """
    if inputs.ndim != 4 or least == 0:
        return inputs
    from torchvision.transforms.v2 import RandomResizedCrop

    cut = RandomResizedCrop(list(inputs.shape[-2:]), scale=(least, 1.0))
    return torch.stack([cut(image) for image in inputs])
