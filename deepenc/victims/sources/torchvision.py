"""Any torchvision classification network, with images in folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models

from deepenc.errors import VictimError, near
from deepenc.network.factory import Factory
from deepenc.network.guard import first_line
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.images import class_folders, content, opened
from deepenc.victims.data.splits import digests, fingerprint, split
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

Transform = Callable[[Any], Tensor]


class Torchvision(VictimSource):
    """A torchvision classification model by name, official weights, images from folders, one a class."""

    name: ClassVar[str] = "torchvision"

    model: str = Field("resnet18")
    """Name in torchvision, e.g. ``resnet50``."""
    weights: str = Field("DEFAULT")
    """Official weights by name (``DEFAULT``, ``IMAGENET1K_V1``, ...), a file with a state dict, or ``none``
    for a random initialisation, good only to look at the structure."""
    classes: int = Field(1000, ge=2)
    """Classes of the network; official weights have 1000."""
    folder: Path | None = Field(None)
    """Images that the network was not trained on, one folder a class: the attacker's and the judge's, and the
    defender's where ``defender_folder`` is not given."""
    defender_folder: Path | None = Field(None)
    """The defender's images, one folder a class; the network may have been trained on them."""
    defender_images: int = Field(200, ge=1)
    """The defender's images to take."""
    attacker_images: int = Field(1000, ge=1)
    """The attacker's images to take."""
    judge_images: int = Field(1000, ge=1)
    """The judge's images to take."""

    @property
    def label(self) -> str:
        """The model's own name."""
        return self.model

    @property
    def random(self) -> bool:
        """See `VictimSource.random`."""
        return self.weights == "none"

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        self._check_name()
        size = _input_size(self._transform())
        noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        return self._network(cache), noise

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        arguments: dict[str, Any] = {} if self.classes == 1000 else {"num_classes": self.classes}
        return Factory(library="torchvision", name=self.model, arguments=arguments)

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        self._check_name()
        if self.folder is None:
            raise VictimError(f"victim {self.label!r} needs images; give `folder`, with one folder a class")
        sizes = (self.attacker_images, self.judge_images)
        if self.defender_folder is None:
            parts = self._images(self.folder, (*sizes, self.defender_images), set())
        else:
            seen: set[bytes] = set()
            (own,) = self._images(self.defender_folder, (self.defender_images,), seen)
            parts = [*self._images(self.folder, sizes, seen), own]
        attacker, judge, defender = parts
        network = self._network(cache)
        return Victim(
            self.label,
            network,
            Classification(classes=self.classes),
            defender,
            attacker,
            judge,
            fingerprint(network, defender, attacker, judge),
        )

    def _check_name(self) -> None:
        known = models.list_models(module=models)
        if self.model not in known:
            raise VictimError(f"torchvision has no model {self.model!r}: {near(self.model, known)}")

    def _official(self) -> Any:
        """The official weights that are asked for, or that fit the file's or the random network's input."""
        known = models.get_model_weights(self.model)
        wanted = self.weights if self.weights in known.__members__ else "DEFAULT"
        return known[wanted]

    def _transform(self) -> Transform:
        transform: Transform = self._official().transforms()
        return transform

    def _network(self, cache: Path) -> nn.Module:
        if self.weights in models.get_model_weights(self.model).__members__:
            return self._downloaded(cache)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network: nn.Module = models.get_model(self.model, weights=None, num_classes=self.classes)
        if self.weights != "none":
            path = Path(self.weights)
            if not (path.exists() or path.is_symlink()):
                known = [*models.get_model_weights(self.model).__members__, "none"]
                raise VictimError(
                    f"{self.weights!r} is neither a file nor weights of {self.model}: "
                    f"{near(self.weights, known)}"
                )
            load_into(network, path, self.model)
        return network.eval()

    def _downloaded(self, cache: Path) -> nn.Module:
        official = self._official()
        if self.classes != len(official.meta["categories"]):
            raise VictimError(
                f"the official weights of {self.model} have {len(official.meta['categories'])} classes, "
                f"`classes` is {self.classes}; leave it out, or give a file of weights"
            )
        try:
            state = torch.hub.load_state_dict_from_url(
                official.url,
                model_dir=str(cache / "torchvision"),
                map_location="cpu",
                progress=False,
                check_hash=True,
                weights_only=True,
            )
        except Exception as error:  # no connection, no room, or a damaged file in the cache
            raise VictimError(
                f"cannot get the weights of {self.model} from {official.url} ({first_line(error)}); download "
                "the file elsewhere and give its path as `weights`, or remove a damaged one from the cache"
            ) from error
        network: nn.Module = models.get_model(self.model, weights=None)
        network.load_state_dict(state)
        return network.eval()

    def _images(self, folder: Path, sizes: Sequence[int], seen: set[bytes]) -> list[Examples]:
        """Parts of a folder's images, without those that were seen; adds to them."""
        found = class_folders(folder)
        classes = self._classes_of(list(found), folder)
        paths = [path for images in found.values() for path in images]
        transform = self._transform()
        drawn = _drawn(paths, folder, sum(sizes), seen, lambda path: transform(opened(path)))
        parts = []
        for part in split([image.content for image in drawn], sizes):
            chosen = [drawn[i] for i in part]
            labels = [classes[image.path.relative_to(folder).parts[0]] for image in chosen]
            inputs = torch.stack([image.inputs for image in chosen])
            parts.append(Examples(inputs, torch.tensor(labels, dtype=torch.int64)))
        return parts

    def _classes_of(self, names: Sequence[str], folder: Path) -> Mapping[str, int]:
        """Class number of every class folder: by the classes' names where they are told, else by order."""
        categories = list(self._official().meta["categories"])
        if self.classes == len(categories) and set(names) <= set(categories):
            return {name: categories.index(name) for name in names}
        if len(names) != self.classes:
            raise VictimError(
                f"{folder} has {len(names)} class folders, the network {self.classes} classes; have a "
                "folder for each class, in the order of their numbers, or name the folders by the classes "
                "(for official weights: 'tench', 'goldfish', ...)"
            )
        return {name: number for number, name in enumerate(names)}


class _Drawn(NamedTuple):
    """An image that was drawn: its file, the file's hash, and what the network is given."""

    content: bytes
    path: Path
    inputs: Tensor


def _drawn(
    paths: Sequence[Path], folder: Path, count: int, seen: set[bytes], read: Callable[[Path], Tensor]
) -> list[_Drawn]:
    """Images that differ, and were not seen before, in an order that their files' names alone decide."""
    found: list[_Drawn] = []
    for path in sorted(
        paths,
        key=lambda p: hashlib.sha256(
            p.relative_to(folder).as_posix().encode(errors="surrogateescape")
        ).digest(),
    ):
        if len(found) == count:
            break
        file = content(path)
        if file in seen:
            continue
        inputs = read(path)
        (pixels,) = digests(inputs[None].numpy())  # the same image may be in files of two formats
        if pixels not in seen:
            found.append(_Drawn(file, path, inputs))
        seen |= {file, pixels}
    if len(found) < count:
        raise VictimError(
            f"expected {count} different images in {folder}, got {len(found)}; lower `attacker_images`, "
            "`judge_images` or `defender_images`, or add images"
        )
    return found


def _input_size(transform: Any) -> int:
    crop = getattr(transform, "crop_size", [224])
    return int(np.max(crop))
