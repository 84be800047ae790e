"""The layout of He et al. 2015, Section 4.2, option A."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepenc.victims.models import Block, CifarResNet

# He et al. 2015, Table 6: parameters in millions, to two digits.
PAPER = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85}


@pytest.mark.parametrize("depth", PAPER)
def test_sizes_are_the_papers(depth):
    network = CifarResNet(depth)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == PAPER[depth]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules()) == depth


def test_shortcut_takes_every_second_pixel_and_pads_channels():
    block = Block(2, 6, 2).eval()
    nn.init.zeros_(block.conv2.weight)  # the other branch is 0: what comes out is the shortcut
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 4:].any()


@pytest.mark.parametrize("depth", [2, 19, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6 n"):
        CifarResNet(depth)


def test_grey_images_and_other_classes():
    assert CifarResNet(8, channels=1, classes=3).eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
