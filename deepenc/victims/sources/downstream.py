"""A pre-trained network on another task, the setting of the paper's Table 5."""

from __future__ import annotations

import copy
import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.calling import call
from deepenc.network.factory import Factory
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cache import trained
from deepenc.victims.data.cifar import cifar100
from deepenc.victims.data.datasets import Dataset, aircraft, cub, data_folder
from deepenc.victims.data.splits import checksum, split
from deepenc.victims.recipe import Recipe
from deepenc.victims.sources.cifar import Cifar10ResNet20
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource

log = logging.getLogger(__name__)

Head = nn.Linear | nn.Conv2d

TASKS = {"cifar100": (cifar100, 100), "cub": (cub, 200), "aircraft": (aircraft, 100)}
"""Loader and number of classes of each task."""
OWNERS_SHARE = 2 / 3
EQUATION_SHARE = 0.1
SEED = 0
CLASSES_ARGUMENT = {"torchvision": "num_classes", "timm": "num_classes", "transformers": "num_labels"}
"""How the libraries' factories call the number of classes."""


class Downstream(VictimSource):
    """A pre-trained network with a new head for CIFAR-100, CUB or FGVC-Aircraft, fresh or fine-tuned.

    With a fresh head it is the setting of the paper's Table 5: the owner gives away the encrypted
    pre-trained network, the thief trains it for a task of his own. The network knows nothing of the task
    yet, so that the thief's gain shows against the same attack on the null defense. The defender's images
    are the base's own, the attacker's the task's training part.

    Trained, it is a victim like any other that was fine-tuned from a public network, which is told to
    attackers who hold the public checkpoint. The owner trains on a share of the task's training part, and
    these are the defender's images; the rest is the attacker's.

    The judge's images are the task's test part. Who gets which is fixed by the images' content.
    """

    name: ClassVar[str] = "downstream"

    base: VictimSource = Field(default_factory=Cifar10ResNet20)
    """The pre-trained network, another victim (``cifar10-resnet56``, ``torchvision:model=resnet50``)."""
    data: Literal["cifar100", "cub", "aircraft"] = "cifar100"
    """The task: CIFAR-100 at 32 pixels, CUB-200-2011 or FGVC-Aircraft at 224 pixels."""
    folder: Path | None = Field(None)
    """Folder with the task's data set in its own public layout; default: the environment variable
    ``DEEPENC_DATA``."""
    classes: int | None = Field(None, ge=2)
    """Only the task's first so many classes; default: all."""
    trained: bool = False
    """Whether the owner fine-tuned the network on the task; done on first use, then kept in the cache."""
    share: float | None = Field(None, gt=0, lt=1)
    """Share of the task's training part that is the owner's; default: two thirds where he trains on it. Else
    none, or a tenth for Equation 1 where the base has no images."""
    epochs: int = Field(12, ge=1)
    """Passes of the owner over his images."""
    lr: float = Field(0.1, gt=0)
    """The owner's first learning rate."""

    @property
    def label(self) -> str:
        """The base and the task."""
        verb = " tuned to " if self.trained else " to "
        some = f" ({self.classes} classes)" if self.classes else ""
        return f"{self.base.label}{verb}{self.data}{some}"

    @property
    def outputs(self) -> int:
        """Number of classes of the new head."""
        return self.classes or TASKS[self.data][1]

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`; a trained one needs the task's images on first use."""
        if self.trained:
            victim = self.load(cache)
            return victim.model, victim.example
        stolen, example = self.base.network(cache)
        return with_head(stolen, example, self.outputs, self.base.label), example

    def structure(self) -> Factory | None:
        """See `VictimSource.structure`."""
        made = self.base.structure()
        if made is None:
            return None
        argument = CLASSES_ARGUMENT.get(made.library)
        if made.name == "deepenc.victims.models:CifarResNet":
            argument = "classes"
        if argument is None:
            return None
        return made.model_copy(update={"arguments": made.arguments | {argument: self.outputs}})

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        stolen, example = self.base.network(cache)
        data = self._data_set(cache)
        _check_inputs(self.base.label, example, data)
        model = with_head(stolen, example, self.outputs, self.base.label)
        own, source = None, ""
        if not self.trained:
            own, source = self._of_the_base(cache)
        attacker = data.train
        if own is None:
            own, attacker = self._shared_out(data)
        if self.trained:
            model = self._tuned(cache, model, own, data)
        told = (checksum(model.state_dict()), source, data.fingerprint, len(own), len(attacker))
        return Victim(
            self.label,
            model,
            Classification(classes=data.classes),
            own,
            attacker,
            data.test,
            hashlib.sha256(repr(told).encode()).hexdigest(),
            stolen if self.trained else None,
            trained=self.trained,
        )

    def _data_set(self, cache: Path) -> Dataset:
        load, classes = TASKS[self.data]
        data = load(data_folder(self.folder, f"victim {self.name!r}"), cache, self.classes)
        if self.classes is None and data.classes != classes:
            raise VictimError(
                f"expected {classes} classes of {data.name}, got {data.classes}; get the data set again, or "
                f"give `classes: {data.classes}`"
            )
        return data

    def _of_the_base(self, cache: Path) -> tuple[Examples | None, str]:
        """The base's own images, and its fingerprint; none where it has no images."""
        try:
            base = self.base.load(cache)
        except VictimError as error:
            log.warning("%s: the defender's images are of the task, since %s", self.label, error)
            return None, ""
        return base.defender, base.fingerprint

    def _shared_out(self, data: Dataset) -> tuple[Examples, Examples]:
        """The owner's and the attacker's share of the training part; slices, so that neither is copied."""
        share = self.share or (OWNERS_SHARE if self.trained else EQUATION_SHARE)
        count = len(data.train)
        first = int(share * count)
        own, rest = map(len, split(data.train_ids, (first, count - first)))
        if not own or not rest:
            raise VictimError(
                f"{data.name} has {count} images to train on; a `share` of {share:g} leaves one side without"
            )
        return data.train[:own], data.train[own:]

    def _tuned(self, cache: Path, model: nn.Module, images: Examples, data: Dataset) -> nn.Module:
        """The network after its owner's training."""
        recipe = Recipe(epochs=self.epochs, lr=self.lr, weight_decay=5e-4, shift=0.125, flip=True, mixed=True)
        # Another recipe, network or share of the images is another file.
        told = (asdict(recipe), checksum(model.state_dict()), data.fingerprint, len(images), SEED)
        key = hashlib.sha256(repr(told).encode()).hexdigest()[:16]

        def train(network: nn.Module) -> None:
            fit(network, Classification(), images, recipe, torch.Generator().manual_seed(SEED))

        return trained(cache / f"downstream-{self.data}-{key}.safetensors", model, train)


def with_head(network: nn.Module, example: Any, classes: int, who: str) -> nn.Module:
    """A copy of a network whose last layer is freshly initialised, always alike, for other classes.

    Args:
        network: In eval mode.
        example: An input, as a batch of one.
        classes: Outputs of the new head.
        who: The network, for messages.

    Raises:
        VictimError: The network does not classify with a last linear layer or convolution.
    """
    changed = copy.deepcopy(network)
    name, old = _head(changed, example, who)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        head = _like(old, classes).to(old.weight.dtype)
    parent, _, leaf = name.rpartition(".")
    setattr(changed.get_submodule(parent), leaf, head)
    try:
        got = _outputs(changed, example)
    except (RuntimeError, ValueError) as error:  # a later layer counts on the old number of classes
        raise VictimError(f"{who}: {name!r} is no head that can be replaced: {error}") from error
    if got != classes:
        raise VictimError(f"{who}: {name!r} is no head that can be replaced: expected {classes}, got {got}")
    return changed.eval()


def _head(network: nn.Module, example: Any, who: str) -> tuple[str, Head]:
    """The layer that ran last of those with as many outputs as the network."""
    ran: list[tuple[str, Head]] = []
    hooks = [
        module.register_forward_hook(lambda *_, found=(name, module): ran.append(found))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name
    ]
    try:
        outputs = _outputs(network, example)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [
        (name, module)
        for name, module in ran
        if (module.out_features if isinstance(module, nn.Linear) else module.out_channels) == outputs
    ]
    if outputs is None or not heads:
        raise VictimError(
            f"{who} has no head to replace: expected outputs (images, classes), and a linear layer or a "
            "convolution with as many outputs; take a network that classifies as `base`"
        )
    return heads[-1]


def _outputs(network: nn.Module, example: Any) -> int | None:
    """Classes of the network's outputs; None where they are not those of a classifier."""
    with torch.no_grad():
        found = call(network, example)
    found = getattr(found, "logits", found)
    return found.shape[1] if isinstance(found, Tensor) and found.ndim == 2 else None


def _like(head: Head, classes: int) -> Head:
    bias = head.bias is not None
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, classes, bias=bias)
    if head.groups != 1:
        raise VictimError(
            f"a head of {head.groups} groups cannot be made for {classes} classes; take another `base`"
        )
    return nn.Conv2d(
        head.in_channels,
        classes,
        head.kernel_size,  # type: ignore[arg-type]
        head.stride,  # type: ignore[arg-type]
        head.padding,  # type: ignore[arg-type]
        head.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=head.padding_mode,
    )


def _check_inputs(who: str, example: Any, data: Dataset) -> None:
    shape = tuple(data.train.inputs.shape[1:])
    got = tuple(example.shape[1:]) if isinstance(example, Tensor) else type(example).__name__
    if got != shape:
        raise VictimError(
            f"{data.name} has inputs {shape}, {who} takes {got}; choose a `base` that takes such images, or "
            "another task as `data`"
        )
