"""Public CIFAR-10 ResNets with CIFAR-10 itself."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory
from deepenc.victims.data import digests, fingerprint, split
from deepenc.victims.models import CifarResNet
from deepenc.victims.victim import Images, Victim, VictimSource

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFENDER = 5000
ATTACKER_SHARE = 0.4
DAMAGED = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
"""What the readers raise on files that are cut or altered."""
LAYOUTS = {"CIFAR10": ("cifar10", "cifar-10-batches-py"), "CIFAR100": ("cifar100", "cifar-100-python")}
"""Folders of the data sets, by torchvision's name: of the arrays, and as they are published."""
Raw = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images ``(images, 32, 32, 3)`` and labels ``(images,)``."""


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
        return Victim(self.label, model, 10, defender, attacker, judge, fingerprint(model, *parts))

    def full_test(self) -> Images:
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


def data_folder(given: Path | None, who: str) -> Path:
    """The folder given, or that of the environment variable ``DEEPENC_DATA``.

    Args:
        given: By a configuration.
        who: Needs it, for messages.

    Raises:
        VictimError: None is given, or it does not exist.
    """
    folder = given or os.environ.get("DEEPENC_DATA")
    if not folder:
        raise VictimError(
            f"{who} needs a data folder; give it as `folder` or in the environment variable DEEPENC_DATA"
        )
    if not Path(folder).is_dir():
        raise VictimError(f"{who}: no data folder at {Path(folder).absolute()}")
    return Path(folder)


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
        stored = torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
        raise VictimError(
            f"{found[0]} does not hold the weights of ResNet-{depth} ({error}); get the file anew"
        ) from error
    return model.eval()


def read_images(root: Path, part: str, data: str = "CIFAR10") -> Raw:
    """The images of CIFAR-10 or CIFAR-100, from either layout.

    Args:
        root: The data folder.
        part: ``"train"`` or ``"test"``.
        data: ``"CIFAR10"`` or ``"CIFAR100"``.

    Raises:
        VictimError: They are missing or unusable.
    """
    arrays, published = LAYOUTS[data]
    archive, batches, called = root / arrays / f"{part}.npz", root / published, data.replace("R", "R-")
    try:
        if archive.is_file():
            with archive.open("rb") as file, np.load(file, allow_pickle=False) as held:
                images, labels = held["images"], held["labels"].astype(np.int64)
        elif batches.is_dir():
            from torchvision import datasets

            found = getattr(datasets, data)(str(root), train=part == "train", download=False)
            images, labels = found.data, np.array(found.targets, dtype=np.int64)
        else:
            raise VictimError(
                f"no {called} in {root}: expected {archive} or {batches}; unpack "
                f"{called.lower()}-python.tar.gz of cs.toronto.edu/~kriz/cifar.html there"
            )
    except (*DAMAGED, KeyError) as error:
        raise VictimError(
            f"the {called} {part} images in {root} are damaged ({error}); get them anew"
        ) from error
    if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise VictimError(
            f"expected uint8 images (N, 32, 32, 3) with N labels in {root}, "
            f"got {images.dtype} {images.shape} with {labels.shape}"
        )
    return images, labels


def normalised(images: NDArray[np.uint8], labels: NDArray[np.int64], index: NDArray[np.int64]) -> Images:
    """Chosen images as the networks take them: ``(images, 3, 32, 32)``, float32."""
    pixels = torch.from_numpy(images[index]).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return Images(((pixels - mean) / deviation).contiguous(), torch.from_numpy(labels[index]))
