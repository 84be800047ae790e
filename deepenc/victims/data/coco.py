"""Images with objects in COCO's JSON, read from their files when they are needed."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.coco import api
from deepenc.victims.data.images import content, expect_file, opened
from deepenc.victims.data.pennfudan import Item, pixels

log = logging.getLogger(__name__)

MARGIN = 1.0
"""Pixels by which a box may reach over the border of its image, as rounding makes it; it is cut there."""
Annotation = Mapping[str, Any]


class CocoImages(Dataset[Item]):
    """The images that a file of COCO names, in its order; labels are its category ids.

    Objects without extent are left out: COCO itself has a few.

    Args:
        folder: Of the images.
        annotations: The JSON file (``instances_val2017.json``): ``images``, ``annotations``, ``categories``.
        masks: Whether targets have masks beside the boxes; needs the extra ``detection``.

    Raises:
        VictimError: The file is missing or is not of that form, an image is missing, or an object lies
            outside of its image or is of a category that is not listed.
    """

    def __init__(self, folder: Path, annotations: Path, *, masks: bool = False) -> None:
        self.masks, self._where = masks, annotations
        told = _read(annotations)
        try:
            self.images = [
                (folder / str(image["file_name"]), int(image["width"]), int(image["height"]), image["id"])
                for image in told["images"]
            ]
            self.categories = {int(category["id"]): str(category["name"]) for category in told["categories"]}
            self._objects: dict[Any, list[Annotation]] = defaultdict(list)
            sizes = {image: (width, height) for _, width, height, image in self.images}
            for annotation in told["annotations"]:
                self._note(annotation, sizes)
        except (KeyError, TypeError, ValueError) as error:
            raise VictimError(
                f"{annotations} is not in COCO's form ({type(error).__name__}: {error}); give a file of "
                "instances, with `images`, `annotations` and `categories`"
            ) from error
        if not self.images:
            raise VictimError(f"{annotations} names no images; give another file of instances")
        missing = [path for path, *_ in self.images if not path.is_file()]
        if missing:
            raise VictimError(
                f"{len(missing)} of the {len(self.images)} images that {annotations} names are missing, "
                f"first {missing[0]}; get them, or give the folder that holds them"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        """An image with its targets.

        Raises:
            VictimError: The file is damaged, or of another size than the JSON says.
        """
        path, width, height, image = self.images[index]
        picture = opened(path)
        if picture.size != (width, height):
            raise VictimError(
                f"{path} has {picture.width} x {picture.height} pixels, {self._where} says {width} x "
                f"{height}; get the image or the file again"
            )
        objects = self._objects[image]
        boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        target = {
            "boxes": torch.from_numpy(corners.clip(0, [width, height] * 2)).float(),
            "labels": torch.tensor([int(o["category_id"]) for o in objects], dtype=torch.int64),
            "area": torch.tensor([float(o.get("area", o["bbox"][2] * o["bbox"][3])) for o in objects]),
            "iscrowd": torch.tensor([int(o.get("iscrowd", 0)) for o in objects], dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = self._masks(objects, width, height)
        return pixels(picture), target

    def digest(self, index: int) -> bytes:
        """SHA-256 of the image's file."""
        return content(self.images[index][0])

    def _note(self, annotation: Annotation, sizes: Mapping[Any, tuple[int, int]]) -> None:
        """Keep an annotation with its image, if it is sound."""
        number, image = annotation.get("id"), annotation["image_id"]
        left, top, width, height = map(float, annotation["bbox"])
        if image not in sizes:
            raise VictimError(
                f"{self._where}: annotation {number} is of image {image!r}, which is not listed"
            )
        category = int(annotation["category_id"])
        if category not in self.categories or category < 1:
            raise VictimError(
                f"{self._where}: annotation {number} has the category {category}; expected one of those "
                "listed, from 1, since 0 is the background"
            )
        wide, high = sizes[image]
        if not (
            left >= -MARGIN
            and top >= -MARGIN
            and left + width <= wide + MARGIN
            and top + height <= high + MARGIN
        ):
            raise VictimError(
                f"{self._where}: the box {[left, top, width, height]} (x, y, width, height) of annotation "
                f"{number} lies outside of image {image!r} with {wide} x {high} pixels; mend or remove it"
            )
        if min(width, height) <= 0:
            log.warning("%s: annotation %s has no extent and is left out", self._where, number)
            return
        self._objects[image].append(annotation)

    def _masks(self, objects: Sequence[Annotation], width: int, height: int) -> Tensor:
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        mask = api().mask
        for place, told in enumerate(objects):
            try:
                drawn = mask.decode(mask.segmToRle(told["segmentation"], width, height))
                masks[place] = torch.from_numpy(drawn.reshape(height, width))
            except Exception as error:  # the decoder raises whatever a forged outline leads it to
                raise VictimError(
                    f"{self._where}: the outline of annotation {told.get('id')} cannot be drawn "
                    f"({type(error).__name__}: {first_line(error)}); mend or remove it"
                ) from error
        return masks


def _read(path: Path) -> Any:
    expect_file(path, "a JSON file of COCO")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise VictimError(f"{path} is not readable as JSON ({error}); get it again") from error
    if not isinstance(told, dict):
        raise VictimError(f"{path}: expected a JSON object with `images`, got {type(told).__name__}")
    return told
