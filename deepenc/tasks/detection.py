"""Detection and instance segmentation, by the convention of torchvision's detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import box_iou

from deepenc import trees
from deepenc.tasks import coco
from deepenc.tasks.dense import dense
from deepenc.tasks.task import Offer, Outcome, Task, Worth

FLIPPED = 0.1
"""Share of the scores, in sum, that may be another's: of two boxes that overlap one is suppressed, and which
one hangs on the last bit."""
AT_ONCE = 16
"""Images that are run at once, at most: each may be of a megapixel, and makes a thousand regions."""
SAME = 0.5
"""Overlap from which two boxes are of the same object."""
HEADS = ("box_predictor", "mask_predictor", "keypoint_predictor", "classification_head", "regression_head")
"""Modules that make a detector's outputs, as torchvision calls them."""


class Detection(Task):
    """Boxes and classes of the objects in an image; AP of COCO.

    Inputs are a list of images ``(channels, height, width)``; targets a list of dicts of ``boxes``
    ``(objects, 4)`` (left, top, right, bottom, in pixels) and ``labels`` ``(objects,)`` from 1, and where
    they are known ``area`` and ``iscrowd`` ``(objects,)``. A network is called with a list of images, and
    gives a dict of ``boxes``, ``labels`` and ``scores`` for each; or, in training mode, with images and
    targets, and gives a dict of losses.
    """

    name: ClassVar[str] = "detection"
    measure: ClassVar[str] = "AP"
    at_once: ClassVar[int] = AT_ONCE
    offers: ClassVar[frozenset[Offer]] = frozenset({"answers"})

    classes: int | None = Field(None, ge=2)
    """Number of classes, the background as class 0 included; default: any."""
    sure: float = Field(0.5, ge=0, lt=1)
    """Score from which a detection is an answer to train another network on."""

    def run(self, network: nn.Module, inputs: Any) -> list[dict[str, Tensor]]:
        """Detections in each image, independent of the images beside it.

        Images of different shapes are run apart, unless the detector itself brings them to one: it would pad
        them to the largest, and so answer differently in company.
        """
        found: list[Any] = [None] * len(inputs)
        with _detecting(network, training=False):
            for group in alike_in_shape(network, inputs):
                for some in (group[at : at + AT_ONCE] for at in range(0, len(group), AT_ONCE)):
                    for place, one in zip(some, network([inputs[i] for i in some]), strict=True):
                        found[place] = one
        return found

    def collate(self, items: Sequence[Any]) -> tuple[Any, Any]:
        """Lists of images and of targets."""
        inputs, targets = zip(*items, strict=True)
        return list(inputs), list(targets)

    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """The sum of the detector's own losses.

        Only the modules that look at targets are in training mode for it; BatchNorm and dropout stay as they
        are. Detectors draw the regions that they learn from; in eval mode always the same ones.
        """
        known = [{k: v for k, v in target.items() if isinstance(v, Tensor)} for target in targets]
        with _detecting(network, training=True) as drawing, torch.random.fork_rng(enabled=not drawing):
            if not drawing:
                torch.manual_seed(0)
            losses: Mapping[str, Tensor] = network(inputs, known)
        return torch.stack([*losses.values()]).sum()

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """For each image what the evaluator looks at, see `deepenc.tasks.coco.table`."""
        return [coco.table(_found(one), _real(wanted)) for one, wanted in self._readable(outputs, targets)]

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """AP at overlaps from 0.5 to 0.95, AP50, AP75, and AP of small, medium and large objects."""
        found = coco.averages(outcomes)
        return Worth(found.pop("AP", 0.0), found)

    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """See `Task.complaint`."""
        wanted = "expected a dict of boxes, labels and scores for each image"
        if not isinstance(outputs, list) or len(outputs) != trees.size(inputs):
            return f"{wanted}, here {trees.size(inputs)}, got {trees.described(outputs)}"
        for image, one in enumerate(outputs):
            if not isinstance(one, dict) or not self._parts().keys() <= one.keys():
                return f"{wanted}, got {trees.described(one)} for image {image}"
            count = len(one["scores"])
            for part, ndim in self._parts().items():
                if one[part].ndim != ndim or len(one[part]) != count:
                    return f"expected {count} {part} for image {image}, got {trees.described(one[part])}"
        return None

    def alike(self, first: Any, second: Any, tolerance: float) -> list[bool]:
        """Which images have equal detections, by the sum of the scores that differ or stand alone."""
        return [_alike(one, other) for one, other in zip(first, second, strict=True)]

    def misfit(self, targets: Any) -> str | None:
        """See `Task.misfit`."""
        if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
            return f"expected a dict of boxes and labels for each image, got {trees.described(targets)}"
        wrong = ((image, self._misfit(target)) for image, target in enumerate(targets))
        return next((f"{what} (image {image} of the batch)" for image, what in wrong if what), None)

    def uninformative(self, targets: Any) -> str | None:
        """Why one answer to every image would be right: there is nothing to find."""
        return None if any(len(target["boxes"]) for target in targets) else "no image shows any object"

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """The layers that make classes, boxes and masks."""
        return tuple(path for path, _ in network.named_modules() if path.rpartition(".")[2] in HEADS)

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """Detections with a score of at least `sure`, as targets."""
        return [self._answer(one) for one in outputs]

    def response(self, network: nn.Module, inputs: Any) -> Tensor:
        """What the detector says before it chooses among boxes, ``(images, numbers)``, see `tasks.dense`."""
        found: list[Any] = [None] * len(inputs)
        with _detecting(network, training=False):
            for group in alike_in_shape(network, inputs):
                for place, one in zip(group, dense(network, [inputs[i] for i in group]), strict=True):
                    found[place] = one
        return torch.stack(found)

    def _parts(self) -> dict[str, int]:
        """What an image's detections hold, and with how many dimensions."""
        return {"boxes": 2, "labels": 1, "scores": 1}

    def _readable(self, outputs: Any, targets: Any) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Detections and targets of each image; of one with a NaN there are none."""
        for one, wanted, bad in zip(outputs, targets, self.unreadable(outputs), strict=True):
            yield ({name: part[:0] for name, part in one.items()} if bad else one), wanted

    def _misfit(self, target: Mapping[str, Any]) -> str | None:
        boxes, labels = target.get("boxes"), target.get("labels")
        if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
            return f"expected boxes (objects, 4), got {trees.described(boxes)}"
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            return f"expected a label for each of {len(boxes)} boxes, int64, got {trees.described(labels)}"
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()) or not bool(boxes.isfinite().all()):
            return "expected boxes as left, top, right, bottom, with left < right and top < bottom"
        most = int(labels.max()) if len(labels) else 1
        if len(labels) and (int(labels.min()) < 1 or (self.classes is not None and most >= self.classes)):
            upper = "" if self.classes is None else f" and below {self.classes}, the number of classes"
            return f"expected labels from 1 (0 is the background){upper}, got {int(labels.min())} to {most}"
        return None

    def _kept(self, one: Mapping[str, Tensor]) -> Tensor:
        """Which detections are sure, and have a box at all."""
        boxes = one["boxes"]
        return (one["scores"] >= self.sure) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)

    def _answer(self, one: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = self._kept(one)
        return {"boxes": one["boxes"][kept].detach(), "labels": one["labels"][kept]}


class InstanceSegmentation(Detection):
    """Masks, boxes and classes of the objects in an image; mask AP of COCO.

    As `Detection`; targets and outputs also have ``masks``: 0 or 1 ``(objects, height, width)``, and the
    probabilities ``(objects, 1, height, width)``. Box AP stands beside the mask AP.
    """

    name: ClassVar[str] = "instance-segmentation"
    measure: ClassVar[str] = "mask AP"

    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """For each image a table of the masks, and behind it one of the boxes."""
        return [
            np.concatenate([
                coco.table(_found(one, masks=True), _real(wanted, masks=True)),
                coco.table(_found(one), _real(wanted)),
            ])
            for one, wanted in self._readable(outputs, targets)
        ]  # fmt: skip

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """As for `Detection`, of the masks and, beside it, of the boxes."""
        masks = [outcome[: coco.length(outcome)] for outcome in outcomes]
        boxes = [outcome[len(table) :] for outcome, table in zip(outcomes, masks, strict=True)]
        found, beside = coco.averages(masks), coco.averages(boxes)
        return Worth(found.pop("AP", 0.0), found | {f"box {name}": value for name, value in beside.items()})

    def _parts(self) -> dict[str, int]:
        return super()._parts() | {"masks": 4}

    def _misfit(self, target: Mapping[str, Any]) -> str | None:
        masks = target.get("masks")
        if wrong := super()._misfit(target):
            return wrong
        if not isinstance(masks, Tensor) or masks.ndim != 3 or len(masks) != len(target["boxes"]):
            return f"expected masks ({len(target['boxes'])}, height, width), got {trees.described(masks)}"
        return None if bool(((masks == 0) | (masks == 1)).all()) else "expected masks of 0 and 1"

    def _answer(self, one: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super()._answer(one) | {"masks": _binary(one["masks"][self._kept(one)])}


def alike_in_shape(network: nn.Module, images: Sequence[Tensor]) -> list[list[int]]:
    """Places of the images that may be run at once: those of one shape, or all if it makes it so."""
    if any(getattr(module, "fixed_size", None) is not None for module in network.modules()):
        return [list(range(len(images)))] if images else []
    groups: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape, []).append(place)
    return list(groups.values())


@contextmanager
def _detecting(network: nn.Module, *, training: bool) -> Iterator[bool]:
    """Have the modules that look at targets in a mode for a while; says whether all were in it before.

    These are the detector's own (its transform, its region proposals, its heads), not its layers.
    """
    own = [module for module in network.modules() if _takes_targets(type(module).forward)]
    modes = [module.training for module in own]
    try:
        for module in own:
            module.training = training
        yield all(mode == training for mode in modes)
    finally:
        for module, mode in zip(own, modes, strict=True):
            module.training = mode


@cache
def _takes_targets(forward: Callable[..., Any]) -> bool:
    return "targets" in signature(forward).parameters


def _binary(masks: Tensor) -> Tensor:
    """Probabilities ``(objects, 1, height, width)`` as masks ``(objects, height, width)``, uint8."""
    return (masks[:, 0] > 0.5).to(torch.uint8)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _shapes(of: Mapping[str, Tensor], masks: Tensor | None) -> tuple[Any, Any]:
    """Boxes as x, y, width, height, or masks; and their areas."""
    if masks is not None:
        binary = _array(masks)
        return binary, binary.sum(axis=(1, 2)).astype(np.float64)
    corners = _array(of["boxes"]).astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return boxes, boxes[:, 2] * boxes[:, 3]


def _found(one: Mapping[str, Tensor], *, masks: bool = False) -> coco.Objects:
    shapes, areas = _shapes(one, _binary(one["masks"]) if masks else None)
    return coco.Objects(shapes, _array(one["labels"]), areas, _array(one["scores"]).astype(np.float64))


def _real(wanted: Mapping[str, Tensor], *, masks: bool = False) -> coco.Objects:
    shapes, areas = _shapes(wanted, wanted["masks"].to(torch.uint8) if masks else None)
    labels = _array(wanted["labels"])
    if "area" in wanted:
        areas = _array(wanted["area"]).astype(np.float64)
    crowds = _array(wanted["iscrowd"]) if "iscrowd" in wanted else np.zeros(len(labels))
    return coco.Objects(shapes, labels, areas, crowds.astype(np.float64))


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether the detections that differ, or that only one has, weigh little beside all."""
    scores, others = one["scores"].double(), other["scores"].double()
    total = float(scores.sum() + others.sum())
    if not len(scores) or not len(others):
        return total <= FLIPPED
    same = (box_iou(one["boxes"], other["boxes"]) >= SAME) & (one["labels"][:, None] == other["labels"])
    apart = torch.where(same, (scores[:, None] - others).abs(), torch.inf)
    missed = torch.minimum(apart.amin(1), scores).sum() + torch.minimum(apart.amin(0), others).sum()
    return float(missed) <= FLIPPED * total
