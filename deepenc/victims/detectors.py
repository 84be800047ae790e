"""The detectors of the small victims: torchvision's R-CNNs, with small heads, on small trunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

LAYERS = {"6": "0", "13": "1", "17": "2"}
"""Layers of MobileNetV2 whose outputs become maps, with strides of 8, 16 and 32."""
CHANNELS = [32, 96, 320]
"""Of these outputs."""
MAPS = 64
"""Channels of every map."""


class PlainTrunk(nn.Module):
    """Four convolutions with BatchNorm, the first three with stride 2.

    Args:
        width: Channels of the first; the others have twice as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 2 * width, 2 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            for before, after, stride in zip(widths[:-1], widths[1:], (2, 2, 2, 1), strict=True)
        )
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, widths[1:]))
        self.out_channels = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """``(images, 3, height, width)`` -> ``(images, channels, height / 8, width / 8)``."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


def small_rcnn(classes: int = 3, masks: bool = False, side: int = 64, width: int = 8) -> nn.Module:
    """A Faster R-CNN or Mask R-CNN that is small enough for tests.

    Args:
        classes: The background included.
        masks: Whether it makes masks, too.
        side: Images are resized to squares of that side.
        width: Of the trunk.
    """
    trunk = PlainTrunk(width)
    anchors = AnchorGenerator(((12, 20, 28),), ((1.0,),))
    more = _mask_head(["0"], trunk.out_channels, (16,), classes) if masks else {}
    return _rcnn(trunk, anchors, ["0"], side, classes, hidden=32, more=more)


def mobilenet_rcnn(classes: int = 2, masks: bool = False, side: int = 160) -> nn.Module:
    """A Faster R-CNN or Mask R-CNN on MobileNetV2 with a feature pyramid, for upright objects.

    Args:
        classes: The background included.
        masks: Whether it makes masks, too.
        side: Images are resized to squares of that side.
    """
    trunk = BackboneWithFPN(mobilenet_v2(weights=None).features[:18], LAYERS, CHANNELS, MAPS)
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((1.0, 2.0, 3.0),) * 4)
    levels = ["0", "1", "2"]
    more = _mask_head(levels, MAPS, (32, 32), classes) if masks else {}
    return _rcnn(trunk, anchors, levels, side, classes, hidden=128, more=more)


def _mask_head(levels: list[str], channels: int, widths: tuple[int, ...], classes: int) -> dict[str, Any]:
    return {
        "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        "mask_head": MaskRCNNHeads(channels, widths, dilation=1),
        "mask_predictor": MaskRCNNPredictor(widths[-1], widths[-1], classes),
    }


def _rcnn(
    trunk: Any,
    anchors: nn.Module,
    levels: list[str],
    side: int,
    classes: int,
    hidden: int,
    more: Mapping[str, Any],
) -> nn.Module:
    """One of torchvision's R-CNNs, with fewer regions than it has by default."""
    kind = MaskRCNN if more else FasterRCNN
    network: Any = kind(
        trunk,
        min_size=side,
        max_size=side,
        fixed_size=(side, side),
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(trunk.out_channels * 25, hidden),
        box_predictor=FastRCNNPredictor(hidden, classes),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
        **more,
    )
    with torch.no_grad():  # a detector that sees nothing yet says so: few regions are objects
        network.roi_heads.box_predictor.cls_score.bias[0] = 1.0
    made: nn.Module = network.eval()
    return made
