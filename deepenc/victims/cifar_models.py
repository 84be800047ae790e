"""A DenseNet and a vision transformer for CIFAR-10, in the layouts of public weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROWTH = 12
LAYERS = (6, 12, 24)
FIRST = 24
"""Channels that a layer adds, layers of the three dense blocks, channels of the first convolution."""


class DenseLayer(nn.Module):
    """Two convolutions behind BatchNorm, whose channels are added to those that came in (Huang et al. 2017).

    Args:
        before: Channels that come in.
    """

    def __init__(self, before: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(images, before, height, width)`` -> ``(images, before + 12, height, width)``."""
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(out)))], 1)


class DenseBlock(nn.Module):
    """Dense layers one after the other.

    Args:
        before: Channels that come in.
        layers: How many.
    """

    def __init__(self, before: int, layers: int) -> None:
        super().__init__()
        self.block = nn.Sequential(*(DenseLayer(before + i * GROWTH) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """``(images, before, height, width)`` -> ``(images, before + 12 layers, height, width)``."""
        return cast(Tensor, self.block(x))


class Transition(nn.Module):
    """Half as many channels, half as large maps.

    Args:
        before: Channels that come in.
    """

    def __init__(self, before: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(before), nn.Conv2d(before, before // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(images, before, height, width)`` -> ``(images, before / 2, height / 2, width / 2)``."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class CifarDenseNet(nn.Module):
    """DenseNet-BC with three dense blocks of 6, 12 and 24 layers and a growth of 12 (Huang et al. 2017).

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, FIRST, 3, padding=1, bias=False)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        width = FIRST
        for number, layers in enumerate(LAYERS, 1):
            parts[f"denseblock{number}"] = DenseBlock(width, layers)
            width += layers * GROWTH
            if number < len(LAYERS):
                parts[f"transition{number}"] = Transition(width)
                width //= 2
        self.features = nn.Sequential(parts)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(images, 3, 32, 32)`` -> logits ``(images, classes)``."""
        x = F.relu(self.bn(self.features(self.conv0(x))))
        return cast(Tensor, self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)))


class Patches(nn.Module):
    """Patches of 4 by 4 pixels as vectors.

    Args:
        width: Of a vector.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        """``(images, 3, height, width)`` -> ``(images, patches, width)``."""
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class CifarViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) of six layers of torch's own encoder, 128 wide, 8 heads.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        width, patches = 128, 64
        self.patch_embed = Patches(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        layer = nn.TransformerEncoderLayer(width, 8, 2 * width, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """``(images, 3, 32, 32)`` -> logits ``(images, classes)``."""
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        return cast(Tensor, self.mlp_head(self.transformer(tokens)[:, 0]))
