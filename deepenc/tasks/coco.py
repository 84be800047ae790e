"""COCO's average precision from what is kept of each image.

The evaluator (faster-coco-eval) looks at an image's detections and objects by their classes, scores, areas
and overlaps, and of the latter two only at comparisons: an area lies in a range of sizes or not, an overlap
reaches a threshold or not and is larger than another or not. These are kept, as a few small whole numbers
(`table`); the evaluator itself then matches and averages (`averages`), with the same result as on the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from deepenc.errors import ConfigError

Numbers = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Overlaps (intersection over union) that count as a match: those of COCO, as its evaluator computes them."""
SIZES = (32.0**2, 96.0**2)
"""Areas in pixels between small, medium and large objects; one of exactly that area is of both ranges."""
AREAS = (512.0, SIZES[0], 4096.0, SIZES[1], 16384.0)
"""An area for each way to lie to `SIZES`: below, on, between, on, above."""
LEVEL = 1024
"""Code of an overlap: how many thresholds it reaches, times this, and its rank among its detection's."""
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The evaluator's first six figures."""


@dataclass(frozen=True, eq=False)
class Objects:
    """Detections or real objects of one image.

    Attributes:
        shapes: Boxes ``(objects, 4)``: x, y, width, height in pixels; or masks ``(objects, height, width)``.
        labels: Classes, ``(objects,)``.
        areas: In pixels, ``(objects,)``.
        scores: Of detections, ``(objects,)``; of real objects 1 for a crowd, else 0.
    """

    shapes: NDArray[Any]
    labels: NDArray[np.int64]
    areas: Numbers
    scores: Numbers

    def by_score(self) -> Self:
        """The highest score first, equal ones in their order."""
        order = np.argsort(-self.scores, kind="stable")
        return type(self)(self.shapes[order], self.labels[order], self.areas[order], self.scores[order])


def table(found: Objects, real: Objects) -> Numbers:
    """What is kept of one image: counts of detections and objects, a row for each, and coded overlaps.

    Args:
        found: The detections.
        real: What there is; `Objects.scores` says which are crowds.

    Returns:
        ``(2 + 3 detections + 3 objects + detections × objects,)``, whole numbers but for the scores.
    """
    found = found.by_score()
    codes = np.zeros((len(found.labels), len(real.labels)))
    for label in np.intersect1d(found.labels, real.labels):
        rows, columns = np.flatnonzero(found.labels == label), np.flatnonzero(real.labels == label)
        crowds = real.scores[columns].astype(int).tolist()
        overlaps = _overlaps(found.shapes[rows], real.shapes[columns], crowds)
        codes[np.ix_(rows, columns)] = [_codes(row) for row in overlaps]
    parts = [np.array([*codes.shape], dtype=np.float64)]
    parts += [np.stack([of.labels, of.scores, _places(of.areas)], axis=1).ravel() for of in (found, real)]
    return np.concatenate([*parts, codes.ravel()])


def averages(tables: Sequence[Numbers]) -> dict[str, float]:
    """The evaluator's figures of all images, in [0, 1]; one for which there is no object is left out.

    Args:
        tables: One an image, from `table`, in any order.
    """
    evaluator = _evaluator([*map(_read, tables)])
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    named = zip(NAMES, evaluator.stats, strict=False)
    return {name: float(value) for name, value in named if value >= 0}


def length(numbers: Numbers) -> int:
    """How many of some numbers belong to the table that they begin with."""
    detections, objects = int(numbers[0]), int(numbers[1])
    return 2 + 3 * (detections + objects) + detections * objects


def api() -> Any:
    """The evaluator's package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise ConfigError(
            f"COCO's average precision needs faster-coco-eval ({error}); pip install 'deepenc[detection]'"
        ) from error
    return faster_coco_eval


def _overlaps(found: NDArray[Any], real: NDArray[Any], crowds: list[int]) -> Numbers:
    """Intersections over union as the evaluator computes them, ``(detections, objects)``."""
    mask = api().mask
    if found.ndim == 3:
        first, second = (
            mask.encode(np.asfortranarray(shapes.transpose(1, 2, 0).astype(np.uint8)))
            for shapes in (found, real)
        )
    else:
        first, second = found.astype(np.float64), real.astype(np.float64)
    return np.asarray(mask.iou(first, second, crowds), dtype=np.float64).reshape(len(found), len(real))


def _codes(overlaps: Numbers) -> Numbers:
    """How many thresholds each overlap reaches, and its rank among those of one detection."""
    reached = (overlaps[:, None] >= THRESHOLDS).sum(axis=1)
    ranks = np.unique(overlaps, return_inverse=True)[1].clip(max=LEVEL - 1)
    return np.where(reached > 0, reached * LEVEL + ranks, 0).astype(np.float64)


def _decoded(codes: Numbers) -> Numbers:
    """Overlaps that compare as those did whose codes these are."""
    reached, ranks = np.divmod(codes, LEVEL)
    lowest = np.concatenate([[0.0], THRESHOLDS])[reached.astype(int)]
    return np.where(reached > 0, lowest + 0.04 * ranks / LEVEL, 0.0)


def _places(areas: Numbers) -> Numbers:
    """Where areas lie to `SIZES`, as places in `AREAS`."""
    reached = [(areas >= size).astype(np.float64) + (areas > size) for size in SIZES]
    return np.asarray(sum(reached), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Table:
    """A table that was read: labels, scores (or crowds) and areas ``(rows, 3)`` of each, and overlaps."""

    found: Numbers
    real: Numbers
    overlaps: Numbers

    def pairs(self, label: int) -> Numbers:
        """Overlaps of one class."""
        found, real = (np.flatnonzero(rows[:, 0] == label) for rows in (self.found, self.real))
        chosen: Numbers = self.overlaps[np.ix_(found, real)]
        return chosen


def _read(numbers: Numbers) -> _Table:
    detections, objects = int(numbers[0]), int(numbers[1])
    ends = np.cumsum([2, 3 * detections, 3 * objects])
    found, real, codes = np.split(numbers, ends)[1:]
    first, second = (part.reshape(-1, 3).copy() for part in (found, real))
    for part in (first, second):
        part[:, 2] = np.array(AREAS)[part[:, 2].astype(int)]
    return _Table(first, second, _decoded(codes).reshape(detections, objects))


def _annotations(tables: Sequence[_Table], real: bool) -> Iterator[dict[str, Any]]:
    number = 0
    for image, read in enumerate(tables):
        for label, score, area in (read.real if real else read.found).tolist():
            number += 1
            told = {"iscrowd": int(score)} if real else {"score": score, "iscrowd": 0}
            box = [0.0, 0.0, 1.0, 1.0]  # never looked at: overlaps are told
            yield {
                "id": number,
                "image_id": image,
                "category_id": int(label),
                "area": area,
                "bbox": box,
                **told,
            }


def _evaluator(tables: Sequence[_Table]) -> Any:
    """The evaluator of boxes, whose overlaps are those of the tables."""
    package = api()

    class Told(package.COCOeval_faster):  # type: ignore[misc, name-defined]  # a class of an optional package
        def computeIoU(self, imgId: int, catId: int) -> Numbers:
            """See the evaluator."""
            most: int = self.params.maxDets[-1]
            return tables[imgId].pairs(catId)[:most]

    labels = {int(label) for read in tables for part in (read.found, read.real) for label in part[:, 0]}
    shared = {
        "images": [{"id": image, "height": 1, "width": 1} for image in range(len(tables))],
        "categories": [{"id": label, "name": str(label)} for label in sorted(labels)],
    }
    sides = [package.COCO(shared | {"annotations": [*_annotations(tables, real)]}) for real in (True, False)]
    return Told(*sides, iouType="bbox")
