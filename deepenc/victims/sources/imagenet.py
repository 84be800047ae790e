"""MobileNetV2 with a sample of ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory
from deepenc.victims.data.datasets import data_folder
from deepenc.victims.sources.torchvision import Torchvision
from deepenc.victims.victim import Victim, VictimSource

ATTACKER, JUDGE, DEFENDER = 400, 400, 200


class ImagenetMobileNet(VictimSource):
    """MobileNetV2 with torchvision's ImageNet weights, on 1,000 images of ImageNet, one of each class.

    The images are probably of those that it was trained on (it is right about 83.8 % of them, and about
    71.9 % of ImageNet's validation images): good to see damage and repair, not to quote accuracy from. 400
    are the attacker's, 400 the judge's, 200 the defender's.
    """

    name: ClassVar[str] = "imagenet-mobilenet"

    folder: Path | None = None
    """Folder with ``imagenet_sample/mobilenet_v2-*.pth`` and ``imagenet_sample/val/``, one folder a class;
    default: the environment variable ``DEEPENC_DATA``. With torchvision's own files: the victim
    ``torchvision:model=mobilenet_v2,folder=...``."""

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        return self._source().network(cache)

    def structure(self) -> Factory | None:
        """See `VictimSource.structure`."""
        return Factory(library="torchvision", name="mobilenet_v2")

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        return self._source().load(cache)

    def _source(self) -> Torchvision:
        root = data_folder(self.folder, f"victim {self.name!r}") / "imagenet_sample"
        found = sorted(root.glob("mobilenet_v2-*.pth"))
        if len(found) != 1 or not (root / "val").is_dir():
            raise VictimError(
                f"expected mobilenet_v2-*.pth and val/ in {root}, found {[path.name for path in found]}; put "
                "torchvision's weights of MobileNetV2 and class folders of ImageNet images there"
            )
        return _Sample(
            model="mobilenet_v2",
            weights=str(found[0]),
            folder=root / "val",
            attacker_images=ATTACKER,
            judge_images=JUDGE,
            defender_images=DEFENDER,
        )


class _Sample(Torchvision):
    """The source by which it is read, under its own name in tables."""

    @property
    def label(self) -> str:
        """See `VictimSource.label`."""
        return ImagenetMobileNet.name
