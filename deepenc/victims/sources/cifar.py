"""Public CIFAR-10 ResNets with CIFAR-10 itself."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cifar import normalised, read_images
from deepenc.victims.data.datasets import data_folder
from deepenc.victims.data.splits import digests, fingerprint, split
from deepenc.victims.models import CifarResNet
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

DEFENDER = 5000
ATTACKER_SHARE = 0.4


class CifarSource(VictimSource):
    """A public CIFAR-10 ResNet; the base of the named depths.

    The network was trained on all 50,000 training images. The defender's images are of these; of the
    10,000 test images, 4,000 are the attacker's and 6,000 the judge's. Who gets which is fixed by the
    images' content, whatever the seeds of a run.

    Attributes:
        depth: Layers with weights.
    """

    depth: ClassVar[int]

    folder: Path | None = Field(default=None)
    """Folder with ``cifar10_resnets/resnet<depth>-*.th`` and either ``cifar10/{train,test}.npz`` or the data
    set's own ``cifar-10-batches-py/``; default: the environment variable ``DEEPENC_DATA``."""

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return load_weights(self.root(), self.depth), noise

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        return Factory(
            library="python", name="deepenc.victims.models:CifarResNet", arguments={"depth": self.depth}
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        root = self.root()
        model = load_weights(root, self.depth)
        train, test = read_images(root, "train"), read_images(root, "test")
        if len(train[0]) == 0 or len(test[0]) < 3:
            raise VictimError(
                f"expected images in {root}, got {len(train[0])} to train and {len(test[0])} to test"
            )
        size = int(ATTACKER_SHARE * len(test[0]))
        train_ids, test_ids = digests(train[0]), digests(test[0])
        seen = set(train_ids)
        fresh = np.array([content not in seen for content in test_ids])
        sides = [part[fresh[part]] for part in split(test_ids, (size, len(test_ids) - size))]
        (own,) = split(train_ids, (min(DEFENDER, len(train_ids)),))
        parts = [normalised(*train, own), *(normalised(*test, side) for side in sides)]
        defender, attacker, judge = parts
        return Victim(
            self.label,
            model,
            Classification(classes=10),
            defender,
            attacker,
            judge,
            fingerprint(model, *parts),
        )

    def full_test(self) -> Examples:
        """All test images, to check that the victim was loaded right; no attacker's or judge's part.

        Raises:
            VictimError: They are missing or unusable.
        """
        images, labels = read_images(self.root(), "test")
        return normalised(images, labels, np.arange(len(images)))

    def root(self) -> Path:
        """The data folder.

        Raises:
            VictimError: None is given, or it does not exist.
        """
        return data_folder(self.folder, f"victim {self.name!r}")


class Cifar10ResNet20(CifarSource):
    """ResNet-20 on CIFAR-10, public weights (91.73 % on the test set)."""

    name: ClassVar[str] = "cifar10-resnet20"
    depth: ClassVar[int] = 20


class Cifar10ResNet32(CifarSource):
    """ResNet-32 on CIFAR-10, public weights."""

    name: ClassVar[str] = "cifar10-resnet32"
    depth: ClassVar[int] = 32


class Cifar10ResNet44(CifarSource):
    """ResNet-44 on CIFAR-10, public weights."""

    name: ClassVar[str] = "cifar10-resnet44"
    depth: ClassVar[int] = 44


class Cifar10ResNet56(CifarSource):
    """ResNet-56 on CIFAR-10, public weights (93.39 % on the test set)."""

    name: ClassVar[str] = "cifar10-resnet56"
    depth: ClassVar[int] = 56


def load_weights(root: Path, depth: int) -> CifarResNet:
    """The public ResNet of a depth, in eval mode.

    Raises:
        VictimError: There is not exactly one file of weights, or it is not of this network.
    """
    folder = root / "cifar10_resnets"
    found = sorted(folder.glob(f"resnet{depth}-*.th"))
    if len(found) != 1:
        raise VictimError(
            f"expected one file {folder}/resnet{depth}-*.th, found {[path.name for path in found]}; put the "
            "public weights there (github.com/akamaster/pytorch_resnet_cifar10, pretrained_models)"
        )
    with torch.random.fork_rng(devices=[]):  # its initialisation is overwritten; nobody's numbers for it
        model = CifarResNet(depth)
    try:
        load_into(model, found[0], f"ResNet-{depth}")
    except VictimError as error:
        raise VictimError(
            f"{found[0].name} does not hold the weights of ResNet-{depth}: {error}; get the file again"
        ) from error
    return model.eval()
