"""What a detector says of an image before it chooses among boxes: always as many numbers, with gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from deepenc.errors import ConfigError
from deepenc.network.calling import removed

GRID = 4
"""Maps are averaged over so many cells along each side; as many boxes lie along each side of an image."""
WIDE = 1.5
"""Width of those boxes, in cells."""
RUN = 64
"""Anchors of detectors without regions are averaged over so many runs."""


class _Heard(Exception):
    """All that is wanted was heard; the rest of the detector need not run."""


def dense(network: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """What a detector says of images, ``(images, numbers)``.

    Of one with regions: the scores and corrections of its anchors, averaged over cells, and, for a fixed grid
    of boxes in place of the regions that it would choose, the scores of classes, corrections and masks. Of
    one without: the scores and corrections of its anchors, averaged over runs. What is behind the choice of
    boxes has no gradient, or another number of values for each image.

    Args:
        network: A detector of torchvision's form, maybe inside another module, in eval mode.
        images: Of one shape.

    Raises:
        ConfigError: It has neither ``rpn`` and ``roi_heads``, nor ``head``.
    """
    parts = {path: module for path, module in network.named_modules() if path}
    regions, heads, only = (_named(parts, path) for path in ("rpn.head", "roi_heads", "head"))
    heard: list[Tensor] = []
    if regions is not None and hasattr(heads, "box_predictor"):
        handles = _on_regions(regions, heads, heard, len(images))
    elif only is not None:
        handles = [only.register_forward_hook(lambda _, __, out: _end(heard, out, len(images)))]
    else:
        raise ConfigError(
            f"{type(network).__name__} is no detector of torchvision's form: expected `rpn.head` and "
            "`roi_heads`, or `head`; measure a layer, as `features:NAME`"
        )
    with removed(handles), suppress(_Heard):
        network(list(images))
    return torch.cat(heard, dim=1)


def _named(parts: Mapping[str, nn.Module], path: str) -> Any:
    """The module of a path, at the top or inside a wrapper."""
    return next((m for own, m in parts.items() if own == path or own.endswith(f".{path}")), None)


def _on_regions(regions: Any, heads: Any, heard: list[Tensor], images: int) -> list[RemovableHandle]:
    """Hooks that hear what is said of anchors and of a grid of boxes, and end the run."""
    given: list[Any] = []

    def anchors(_: nn.Module, __: Any, out: Any) -> None:
        maps = [level for part in out for level in part]
        heard.extend(F.adaptive_avg_pool2d(one, GRID).reshape(images, -1) for one in maps)

    def gridded(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features, proposals, sizes, *rest = args
        boxes = [_grid(*size).to(own) for size, own in zip(sizes, proposals, strict=True)]
        given.extend((features, boxes, sizes))
        return (features, boxes, sizes, *rest), kwargs

    def boxes(_: nn.Module, __: Any, out: Any) -> None:
        masks = []
        if getattr(heads, "mask_predictor", None) is not None:
            drawn = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(*given)))
            masks = [F.adaptive_avg_pool2d(drawn, GRID)]
        _end(heard, (*out, *masks), images)

    return [
        regions.register_forward_hook(anchors),
        heads.register_forward_pre_hook(gridded, with_kwargs=True),
        heads.box_predictor.register_forward_hook(boxes),
    ]


def _end(heard: list[Tensor], out: Any, images: int) -> None:
    """Hear what is said of anchors or boxes, and end the run."""
    for part in out.values() if isinstance(out, Mapping) else out:
        if part.ndim == 3:  # (images, anchors, numbers)
            part = F.adaptive_avg_pool1d(part.transpose(1, 2), RUN)
        heard.append(part.reshape(images, -1))
    raise _Heard


def _grid(height: int, width: int) -> Tensor:
    """Boxes around the centres of cells, ``(cells, 4)``, in pixels."""
    centres = (torch.arange(GRID) + 0.5) / GRID
    y, x = (part.flatten() for part in torch.meshgrid(centres, centres, indexing="ij"))
    half = WIDE / GRID / 2
    corners = torch.stack([x - half, y - half, x + half, y + half], dim=1).clamp(0, 1)
    return corners * torch.tensor([width, height, width, height])
