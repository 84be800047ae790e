"""The embedded detectors: R-CNNs that find generated squares and discs, trained on first use."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from deepenc.network.factory import Factory
from deepenc.tasks.detection import Detection, InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cache import trained
from deepenc.victims.data.shapes import Shapes
from deepenc.victims.data.splits import fingerprint
from deepenc.victims.detectors import small_rcnn
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource

SIZES = (120, 100, 80)
"""Images of the defender, who trains on them, the attacker and the judge."""
RECIPE = Recipe(epochs=20, lr=0.02, batch_size=8, weight_decay=5e-4)
SEED = 0
CLASSES = 3


class ShapesDetector(VictimSource):
    """A small Faster R-CNN, or Mask R-CNN, on generated squares and discs; trained on first use, no download.

    The parts are different numbers from which images are made.
    """

    name: ClassVar[str] = "shapes-detector"

    masks: bool = Field(False)
    """Whether it is a Mask R-CNN, judged by its masks."""

    @property
    def label(self) -> str:
        """The network's kind and its data."""
        return "shapes-maskrcnn" if self.masks else "shapes-fasterrcnn"

    @property
    def task(self) -> Detection:
        """What it is for."""
        return InstanceSegmentation(classes=CLASSES) if self.masks else Detection(classes=CLASSES)

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        victim = self.load(cache)
        return victim.model, victim.example

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        return Factory(
            library="python",
            name="deepenc.victims.detectors:small_rcnn",
            arguments={"classes": CLASSES, "masks": self.masks},
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        defender, attacker, judge = parts = [self._part(number) for number in range(len(SIZES))]
        model = self._trained(cache, defender)
        return Victim(self.label, model, self.task, defender, attacker, judge, fingerprint(model, *parts))

    def _part(self, number: int) -> Examples:
        made = Shapes(SIZES[number], first=sum(SIZES[:number]), masks=self.masks)
        return Examples(*self.task.collate([made[i] for i in range(len(made))]))

    def _trained(self, cache: Path, images: Examples) -> nn.Module:
        # A changed recipe is another file, never old weights under a new recipe.
        recipe = hashlib.sha256(repr((asdict(RECIPE), SIZES, SEED, self.masks)).encode()).hexdigest()[:12]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            model = small_rcnn(CLASSES, self.masks)

        def train(network: nn.Module) -> None:
            fit(network, self.task, images, RECIPE, torch.Generator().manual_seed(SEED))

        return trained(cache / f"{self.label}-{recipe}.safetensors", model, train)
