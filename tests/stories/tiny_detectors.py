"""Tiny victims that find things: small R-CNNs that have learnt a little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import torch

from deepenc.tasks.detection import Detection, InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.shapes import Shapes
from deepenc.victims.detectors import small_rcnn
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim


@cache
def detector(masks: bool) -> Victim:
    """A small R-CNN after some steps on few images, with a public network that is two steps behind."""
    task = InstanceSegmentation(classes=3) if masks else Detection(classes=3)

    def part(count: int, first: int) -> Examples:
        data = Shapes(count, first=first, masks=masks)
        return Examples(*task.collate([data[i] for i in range(count)]))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = small_rcnn(masks=masks)
    defender, generator = part(48, 0), torch.Generator().manual_seed(0)
    assert fit(model, task, defender, Recipe(steps=60, lr=0.02, batch_size=8), generator)
    public = copy.deepcopy(model)
    assert fit(model, task, defender, Recipe(steps=2, lr=0.002, batch_size=8), generator)
    return Victim(f"tiny {task.name}", model, task, defender, part(600, 1000), part(12, 2000), "told", public)


DETECTORS: dict[str, Callable[[], Victim]] = {
    "detection": partial(detector, False),
    "instance-segmentation": partial(detector, True),
}
"""By task."""
