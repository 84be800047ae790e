"""Public networks for CIFAR-10 with CIFAR-10 itself."""

from __future__ import annotations

from abc import abstractmethod
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
from deepenc.victims.data.cifar import Raw, normalised, read_images
from deepenc.victims.data.datasets import DEVIATION, MEAN, data_folder
from deepenc.victims.data.splits import Index, digests, fingerprint, split
from deepenc.victims.models import CifarResNet
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

RESNET = "deepenc.victims.models:CifarResNet"
DEFENDER = 5000
ATTACKER_SHARE = 0.4


class CifarSource(VictimSource):
    """A public network for CIFAR-10; the base of the named ones.

    The network was trained on all 50,000 training images. The defender's images are of these; of the
    10,000 test images, 4,000 are the attacker's and 6,000 the judge's. Who gets which is fixed by the
    images' content, whatever the seeds of a run.

    Attributes:
        factory: Name and arguments of what makes the network.
        mean: Of the images' channels, for values in [0, 1].
        deviation: Likewise.
    """

    factory: ClassVar[tuple[str, dict[str, int]]]
    mean: ClassVar[tuple[float, ...]] = MEAN
    deviation: ClassVar[tuple[float, ...]] = DEVIATION

    folder: Path | None = Field(default=None)
    """Folder with the public weights (``cifar10_resnets/`` or ``cifar10_networks/``) and either
    ``cifar10/{train,test}.npz`` or the data set's own ``cifar-10-batches-py/``; default: the environment
    variable ``DEEPENC_DATA``."""

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return self.loaded(self.root()), noise

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        name, arguments = self.factory
        return Factory(library="python", name=name, arguments=dict(arguments))

    @abstractmethod
    def loaded(self, root: Path) -> nn.Module:
        """The network with its weights, in eval mode.

        Args:
            root: The data folder.

        Raises:
            VictimError: The weights are missing or unusable.
        """

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        root = self.root()
        model = self.loaded(root)
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
        parts = [self._inputs(train, own), *(self._inputs(test, side) for side in sides)]
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
        return self._inputs((images, labels), np.arange(len(images)))

    def _inputs(self, raw: Raw, index: Index) -> Examples:
        return normalised(*raw, index, self.mean, self.deviation)

    def root(self) -> Path:
        """The data folder.

        Raises:
            VictimError: None is given, or it does not exist.
        """
        return data_folder(self.folder, f"victim {self.name!r}")


class CifarResNetSource(CifarSource):
    """A public CIFAR-10 ResNet; the base of the named depths."""

    def loaded(self, root: Path) -> nn.Module:
        """See `CifarSource.loaded`."""
        return load_weights(root, self.factory[1]["depth"])


class Cifar10ResNet20(CifarResNetSource):
    """ResNet-20 on CIFAR-10, public weights (91.73 % on the test set)."""

    name: ClassVar[str] = "cifar10-resnet20"
    factory = (RESNET, {"depth": 20})


class Cifar10ResNet32(CifarResNetSource):
    """ResNet-32 on CIFAR-10, public weights."""

    name: ClassVar[str] = "cifar10-resnet32"
    factory = (RESNET, {"depth": 32})


class Cifar10ResNet44(CifarResNetSource):
    """ResNet-44 on CIFAR-10, public weights."""

    name: ClassVar[str] = "cifar10-resnet44"
    factory = (RESNET, {"depth": 44})


class Cifar10ResNet56(CifarResNetSource):
    """ResNet-56 on CIFAR-10, public weights (93.39 % on the test set)."""

    name: ClassVar[str] = "cifar10-resnet56"
    factory = (RESNET, {"depth": 56})


class CifarNetworkSource(CifarSource):
    """A public network for CIFAR-10 in a safetensors file; the base of the named ones.

    Attributes:
        file: Name of the file in ``cifar10_networks/``.
    """

    file: ClassVar[str]
    mean: ClassVar[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
    deviation: ClassVar[tuple[float, ...]] = (0.2023, 0.1994, 0.2010)

    def loaded(self, root: Path) -> nn.Module:
        """See `CifarSource.loaded`."""
        made = self.structure()
        network = made.build(allow=(made.name,))
        load_into(network, root / "cifar10_networks" / self.file, self.name)
        return network.eval()


class Cifar10DenseNet(CifarNetworkSource):
    """DenseNet-BC on CIFAR-10, public weights (91.1 % on 1,000 test images); BatchNorm stands first."""

    name: ClassVar[str] = "cifar10-densenet"
    file: ClassVar[str] = "densenet_bc.safetensors"
    factory = ("deepenc.victims.cifar_models:CifarDenseNet", {})


class Cifar10ViT(CifarNetworkSource):
    """Vision transformer on CIFAR-10, public weights (73.6 % on 1,000 test images); no BatchNorm anywhere."""

    name: ClassVar[str] = "cifar10-vit"
    file: ClassVar[str] = "vit.safetensors"
    factory = ("deepenc.victims.cifar_models:CifarViT", {})


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
