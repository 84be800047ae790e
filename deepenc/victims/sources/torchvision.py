"""Any torchvision classification network, with images in folders."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models
from torchvision.datasets import ImageFolder

from deepenc.errors import VictimError, near
from deepenc.network.factory import Factory
from deepenc.victims.data.splits import fingerprint, split
from deepenc.victims.victim import Images, Victim, VictimSource

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
            self.classes,
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
            if not path.is_file():
                known = [*models.get_model_weights(self.model).__members__, "none"]
                raise VictimError(
                    f"{self.weights!r} is neither a file nor weights of {self.model}: "
                    f"{near(self.weights, known)}"
                )
            network.load_state_dict(_read_fitting(path, network, self.model))
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
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise VictimError(
                f"cannot get the weights of {self.model} from {official.url} ({error}); download the file "
                "elsewhere and give its path as `weights`, or remove a damaged one from the cache"
            ) from error
        network: nn.Module = models.get_model(self.model, weights=None)
        network.load_state_dict(state)
        return network.eval()

    def _images(self, folder: Path, sizes: Sequence[int], seen: set[bytes]) -> list[Images]:
        """Parts of a folder's images, without those whose files were seen; adds to them."""
        try:
            data = ImageFolder(str(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise VictimError(f"no folder with one folder of images a class: {error}") from error
        classes = self._classes_of(data, folder)
        samples = _drawn([Path(path) for path, _ in data.samples], folder, sum(sizes), seen)
        transform = self._transform()
        parts = []
        for part in split([content for content, _ in samples], sizes):
            chosen = [samples[i][1] for i in part]
            labels = [classes[path.relative_to(folder).parts[0]] for path in chosen]
            parts.append(Images(_stacked(data, chosen, transform), torch.tensor(labels, dtype=torch.int64)))
        return parts

    def _classes_of(self, data: ImageFolder, folder: Path) -> Mapping[str, int]:
        """Class number of every class folder: by the classes' names where they are told, else by order."""
        categories = list(self._official().meta["categories"])
        if self.classes == len(categories) and set(data.classes) <= set(categories):
            return {name: categories.index(name) for name in data.classes}
        if len(data.classes) != self.classes:
            raise VictimError(
                f"{folder} has {len(data.classes)} class folders, the network {self.classes} classes; have a "
                "folder for each class, in the order of their numbers, or name the folders by the classes "
                "(for official weights: 'tench', 'goldfish', ...)"
            )
        return dict(data.class_to_idx)


def _drawn(paths: Sequence[Path], folder: Path, count: int, seen: set[bytes]) -> list[tuple[bytes, Path]]:
    """Files with different contents, not seen before, in an order that their names alone decide."""
    found: list[tuple[bytes, Path]] = []
    for path in sorted(
        paths, key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest()
    ):
        if len(found) == count:
            break
        content = hashlib.sha256(path.read_bytes()).digest()
        if content not in seen:
            seen.add(content)
            found.append((content, path))
    if len(found) < count:
        raise VictimError(
            f"expected {count} different images in {folder}, got {len(found)}; lower `attacker_images`, "
            "`judge_images` or `defender_images`, or add images"
        )
    return found


def _stacked(data: ImageFolder, paths: Sequence[Path], transform: Transform) -> Tensor:
    rows = []
    for path in paths:
        try:
            rows.append(transform(data.loader(str(path))))
        except OSError as error:
            raise VictimError(f"{path} is not a readable image ({error}); remove or replace it") from error
    return torch.stack(rows)


def _input_size(transform: Any) -> int:
    crop = getattr(transform, "crop_size", [224])
    return int(np.max(crop))


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Read a state dict from a safetensors file or one of torch's; code in it is not run.

    Raises:
        VictimError: It is none.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise VictimError(f"{path} is not a file of weights: {error}") from error
    if not isinstance(state, Mapping):
        raise VictimError(
            f"{path} is not a file of weights: expected a state dict, got {type(state).__name__}"
        )
    return state


def _read_fitting(path: Path, network: nn.Module, model: str) -> Mapping[str, Tensor]:
    state = read_state(path)
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    got = {name: getattr(tensor, "shape", None) for name, tensor in state.items()}
    if own != got:
        wrong = sorted(name for name in {*own, *got} if own.get(name) != got.get(name))
        raise VictimError(
            f"{path} does not fit {model}: {len(wrong)} tensors differ, first {wrong[:3]}; give the weights "
            "of that model, and its number of classes as `classes`"
        )
    return state
