"""Any of torchvision's detectors, with images and objects in COCO's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models

from deepenc.errors import VictimError, near
from deepenc.network.factory import Factory
from deepenc.tasks.detection import Detection, InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.coco import CocoImages
from deepenc.victims.data.splits import fingerprint, split
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

Shares = tuple[float, float, float]


class CocoDetector(VictimSource):
    """A detector of torchvision by name, its weights from a file, its images from a folder with COCO's JSON.

    The paper's Tables 2 and 3 are on Faster R-CNN and Mask R-CNN with ResNet-50 and ResNet-101 backbones.
    The images should be none that the network was trained on (val2017).
    """

    name: ClassVar[str] = "coco-detector"

    model: str = Field("fasterrcnn_resnet50_fpn")
    """Name in torchvision, e.g. ``maskrcnn_resnet50_fpn``, ``retinanet_resnet50_fpn``."""
    weights: str = Field("none")
    """File with a state dict, such as torchvision's own for COCO, or ``none`` for a random initialisation,
    good only to look at the structure."""
    classes: int = Field(91, ge=2)
    """Classes of the network, the background included; COCO's official weights have 91."""
    images: Path | None = Field(None)
    """Folder of the images (``val2017``)."""
    annotations: Path | None = Field(None)
    """Their objects (``annotations/instances_val2017.json``)."""
    shares: Shares = Field((0.2, 0.4, 0.4))
    """Shares of the images of the defender, the attacker and the judge, by content."""
    side: int | None = Field(None, ge=32)
    """Short side to which images are resized, in pixels; default: the model's, mostly 800."""
    scope: str = Field("backbone")
    """Submodule in which sites are looked for; the paper encrypts the backbone."""

    @property
    def label(self) -> str:
        """The model's own name."""
        return self.model

    @property
    def random(self) -> bool:
        """See `VictimSource.random`."""
        return self.weights == "none"

    @property
    def task(self) -> Detection:
        """What it is for: masks where the model makes some."""
        kind = InstanceSegmentation if self.model.startswith("maskrcnn") else Detection
        return kind(classes=self.classes)

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        noise: Tensor = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(0))
        return self._network(), ([noise],)

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        sized = {} if self.side is None else {"min_size": self.side}
        return Factory(
            library="torchvision", name=self.model, arguments={"num_classes": self.classes, **sized}
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        if self.images is None or self.annotations is None:
            raise VictimError(
                f"victim {self.label!r} needs images; give `images`, their folder, and `annotations`, their "
                "JSON file of COCO"
            )
        task = self.task
        data = CocoImages(self.images, self.annotations, masks=isinstance(task, InstanceSegmentation))
        total = sum(self.shares)
        sizes = [int(len(data) * share / total) for share in self.shares]
        if min(sizes) < 1:
            raise VictimError(
                f"{self.annotations} names {len(data)} images, too few for three parts of "
                f"{list(self.shares)}; give more, or other `shares`"
            )
        every = Examples.read(data, task.collate)
        places = split([data.digest(i) for i in range(len(data))], sizes)
        defender, attacker, judge = parts = [every[torch.from_numpy(part)] for part in places]
        model = self._network()
        return Victim(
            self.label,
            model,
            task,
            defender,
            attacker,
            judge,
            fingerprint(model, *parts),
            scope=self.scope,
        )

    def _network(self) -> nn.Module:
        known = models.list_models(module=models.detection)
        if self.model not in known:
            raise VictimError(f"torchvision has no detector {self.model!r}: {near(self.model, known)}")
        sized = {} if self.side is None else {"min_size": self.side}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network: nn.Module = models.get_model(
                self.model, weights=None, weights_backbone=None, num_classes=self.classes, **sized
            )
        if self.weights != "none":
            load_into(network, Path(self.weights), self.model)
        return network.eval()
