"""Faster R-CNN and Mask R-CNN on MobileNetV2, trained on Penn-Fudan's pedestrians on first use."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import mobilenet_v2

from deepenc.network.factory import Factory
from deepenc.tasks.detection import Detection, InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cache import trained
from deepenc.victims.data.datasets import data_folder
from deepenc.victims.data.pennfudan import Item, PennFudan, mirrored
from deepenc.victims.data.splits import checksum, fingerprint, split
from deepenc.victims.detectors import LAYERS, mobilenet_rcnn
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

SHARES = (0.47, 0.265)
"""Of the images that are the defender's, who trains on them, and the attacker's; the rest is the judge's."""
RECIPE = Recipe(epochs=16, lr=0.02, final_lr=2e-4, batch_size=8, weight_decay=5e-4)
TRUNK = 0.25
"""Learning rate of the pre-trained layers, as a share of that of the fresh ones."""
CLASSES, SIDE, SEED = 2, 160, 0
WEIGHTS = "imagenet_sample/mobilenet_v2-b0353104.pth"


class PennFudanSource(VictimSource):
    """An R-CNN for pedestrians; the base of the two kinds.

    The trunk is torchvision's MobileNetV2 with its ImageNet weights; all else is trained on the defender's
    80 of the 170 images, some minutes on first use. 45 are the attacker's and 45 the judge's, by their
    content.

    Attributes:
        masks: Whether it is a Mask R-CNN, judged by its masks.
    """

    masks: ClassVar[bool]

    folder: Path | None = Field(None)
    """Folder with ``pennfudan/`` or ``PennFudanPed/``, and the trunk's weights; default: the environment
    variable ``DEEPENC_DATA``."""
    weights: Path | None = Field(None)
    """torchvision's file of ImageNet weights of MobileNetV2; default: as ``mobilenet_v2-b0353104.pth`` in
    ``imagenet_sample/`` of the folder."""
    scope: str = Field("backbone")
    """Submodule in which sites are looked for: as the paper does, in the backbone. The heads can be followed,
    too, but a proof with other weights needs some detections, which a trained detector may not make then."""

    @property
    def task(self) -> Detection:
        """What it is for."""
        return InstanceSegmentation(classes=CLASSES) if self.masks else Detection(classes=CLASSES)

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`; needs the images on first use."""
        victim = self.load(cache)
        return victim.model, victim.example

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        return Factory(
            library="python",
            name="deepenc.victims.detectors:mobilenet_rcnn",
            arguments={"classes": CLASSES, "masks": self.masks, "side": SIDE},
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        root = data_folder(self.folder, f"victim {self.name!r}")
        layouts = (root / name for name in ("pennfudan", "PennFudanPed"))
        data = PennFudan(
            next((path for path in layouts if path.is_dir()), root / "pennfudan"), masks=self.masks
        )
        sizes = [int(share * len(data)) + 1 for share in SHARES]
        ids = [data.digest(i) for i in range(len(data))]
        places = split(ids, (*sizes, len(data) - sum(sizes)))
        every = Examples.read(data, self.task.collate)
        defender, attacker, judge = parts = [every[torch.from_numpy(part)] for part in places]
        model = self._trained(cache, root, data, places[0].tolist(), [ids[i] for i in places[0]])
        return Victim(
            self.label,
            model,
            self.task,
            defender,
            attacker,
            judge,
            fingerprint(model, *parts),
            scope=self.scope,
        )

    def _trained(
        self, cache: Path, root: Path, data: PennFudan, own: list[int], ids: list[bytes]
    ) -> nn.Module:
        model, trunk = self._fresh(root)
        # A changed recipe, trunk or part is another file, never old weights under a new recipe.
        told = (asdict(RECIPE), TRUNK, SIDE, SEED, self.masks, trunk, ids)
        mark = hashlib.sha256(repr(told).encode()).hexdigest()[:12]

        def train(network: nn.Module) -> None:
            groups = {
                n: TRUNK if n.startswith("backbone.body.") else 1.0 for n, _ in network.named_parameters()
            }
            images = Examples.read(_BothWays(data, own), self.task.collate)
            fit(network, self.task, images, RECIPE, torch.Generator().manual_seed(SEED), groups)

        return trained(cache / f"{self.name}-{mark}.safetensors", model, train)

    def _fresh(self, root: Path) -> tuple[nn.Module, str]:
        """The network with its trunk's weights, and what tells these apart."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            model = mobilenet_rcnn(CLASSES, self.masks, SIDE)
            whole = mobilenet_v2(weights=None)
        load_into(whole, self.weights or root / WEIGHTS, "MobileNetV2")
        state = whole.features[: max(map(int, LAYERS)) + 1].state_dict()
        model.get_submodule("backbone.body").load_state_dict(state)
        return model, checksum(state)


class PennFudanFasterRcnn(PennFudanSource):
    """Faster R-CNN on MobileNetV2 with a feature pyramid, for Penn-Fudan's pedestrians."""

    name: ClassVar[str] = "pennfudan-fasterrcnn"
    masks: ClassVar[bool] = False


class PennFudanMaskRcnn(PennFudanSource):
    """Mask R-CNN on MobileNetV2 with a feature pyramid, for Penn-Fudan's pedestrians."""

    name: ClassVar[str] = "pennfudan-maskrcnn"
    masks: ClassVar[bool] = True


class _BothWays(Dataset[Item]):
    """Some examples, and behind them the same mirrored."""

    def __init__(self, data: PennFudan, places: list[int]) -> None:
        self._data, self._places = data, places

    def __len__(self) -> int:
        return 2 * len(self._places)

    def __getitem__(self, index: int) -> Item:
        turned, at = divmod(index, len(self._places))
        item = self._data[self._places[at]]
        return mirrored(item) if turned else item
