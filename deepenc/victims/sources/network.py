"""Any network that a factory makes: of torchvision, timm or transformers, or by a function of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory, without_origin
from deepenc.victims.data.images import expect_file
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

TOKENS = 16
"""Tokens of an example text."""


def _shapes(value: Any) -> Any:
    """``"1x3x64x64"`` as a shape, ``"input_ids:1x16;attention_mask:1x16"`` as several by name."""
    if isinstance(value, str) and ":" in value:
        parts = (item.partition(":") for item in value.split(";"))
        value = {name.strip(): shape for name, _, shape in parts}
    if isinstance(value, Mapping):
        return {name: _shape(shape) for name, shape in value.items()}
    return None if value is None else _shape(value)


def _shape(value: Any) -> tuple[int, ...]:
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        shape = tuple(int(size) for size in sizes)
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"expected a shape such as 1x3x32x32, or some by name (ids:1x16), got {value!r}")
    return shape


Shape = tuple[int, ...]


class Network(VictimSource):
    """Any network by its factory: torchvision:NAME, timm:NAME, transformers:CLASS, or module:function."""

    name: ClassVar[str] = "network"

    factory: Factory = Field(Factory(library="torchvision", name="resnet18"))
    """Who makes the structure: a text, or a mapping of ``library``, ``name`` and ``arguments``. A function
    named here is imported and called; name your own only."""
    config: Path | None = Field(None)
    """JSON file with the factory's arguments, such as the ``config.json`` of a network of transformers."""
    weights: str = Field("none")
    """File of weights (``.safetensors``, or a state dict of torch), or ``none`` for those with which the
    factory makes the network: random ones, good only to look at the structure, if it is a library's."""
    example: Annotated[Shape | dict[str, Shape] | None, BeforeValidator(_shapes)] = Field(None)
    """Shape of an input (``[1, 3, 224, 224]``, or as text ``1x3x224x224``), or of several by name
    (``{input_ids: [1, 16]}``, or ``input_ids:1x16``); ids and masks are integers, all else is noise. Default:
    what the library says of the network."""

    @property
    def label(self) -> str:
        """The factory, and where the weights are from if they are not of a file."""
        if self.weights != "none":
            return str(self.factory)
        made = "as the function makes it" if self.factory.library == "python" else "random weights"
        return f"{self.factory}, {made}"

    @property
    def random(self) -> bool:
        """See `VictimSource.random`."""
        return self.weights == "none" and self.factory.library != "python"

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        if self.config is None:
            return self.factory
        expect_file(self.config, "a JSON file")
        try:
            arguments = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise VictimError(f"cannot read {self.config} ({error}); give a JSON file as `config`") from error
        if not isinstance(arguments, dict):
            raise VictimError(f"{self.config}: expected a JSON object, got {type(arguments).__name__}")
        return self.factory.model_copy(
            update={"arguments": without_origin(arguments) | self.factory.arguments}
        )

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        factory, network = self.structure(), self.built()
        generator = torch.Generator().manual_seed(0)
        if self.example is None:
            return network, _usual(factory, network, generator)
        if isinstance(self.example, Mapping):
            return network, {n: _input(n, shape, network, generator) for n, shape in self.example.items()}
        return network, torch.randn(self.example, generator=generator)

    def built(self) -> nn.Module:
        """The network with its weights, in eval mode.

        Raises:
            VictimError: The weights are missing or unusable.
        """
        factory = self.structure()
        network = factory.build(allow=(factory.name,))
        if self.weights != "none":
            load_into(network, Path(self.weights), str(factory))
        return network.eval()

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`.

        Raises:
            VictimError: Always; there are no images.
        """
        raise VictimError(
            f"victim {self.name!r} ({self.factory}) has no images, so that no attack can be judged on it; it "
            "is for `deepenc inspect`, `encrypt` and `decrypt`. Take the victim 'own' with `data`"
        )


def _usual(factory: Factory, network: nn.Module, generator: torch.Generator) -> Any:
    """An example input as the library describes it.

    Raises:
        VictimError: It does not.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    if factory.library == "torchvision":
        return _for_torchvision(factory.name, noise)
    if factory.library == "timm":
        default: Any = getattr(network, "pretrained_cfg", {})
        channels, height, width = default.get("input_size", (3, 224, 224))
        return noise(
            int(factory.arguments.get("in_chans", channels)),
            *_sides(factory.arguments.get("img_size", (height, width))),
        )
    config: Any = getattr(network, "config", None)
    wanted = getattr(network, "main_input_name", None) if factory.library == "transformers" else None
    more = {"use_cache": False} if getattr(config, "use_cache", False) else {}
    if wanted == "input_ids":
        names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
        return {name: _input(name, (1, TOKENS), network, generator) for name in names} | more
    if wanted == "pixel_values" and hasattr(config, "image_size"):
        return {"pixel_values": noise(getattr(config, "num_channels", 3), *_sides(config.image_size))} | more
    raise VictimError(
        f"no example input is known for {factory}; give its shape as `example`: 1x3x224x224, or "
        "input_ids:1x16"
    )


def _for_torchvision(name: str, noise: Any) -> Any:
    from torchvision import models

    if name in models.list_models(module=models.detection):
        return ([noise(3, 224, 224)[0]],)
    if name in models.list_models(module=models.video):
        return noise(3, 16, 224, 224)
    if name in models.list_models(module=models.optical_flow):
        return (noise(3, 128, 128), noise(3, 128, 128))
    crop = getattr(models.get_model_weights(name)["DEFAULT"].transforms(), "crop_size", [224])
    return noise(3, max(crop), max(crop))


def _sides(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _input(name: str, shape: tuple[int, ...], network: nn.Module, generator: torch.Generator) -> Tensor:
    """An input by its name: tokens, other ids (zero), a mask (one), or noise."""
    if name.endswith("input_ids"):
        words = getattr(getattr(network, "config", None), "vocab_size", 2)
        return torch.randint(int(words), shape, generator=generator)
    if name.endswith(("_ids", "_mask")):
        return torch.full(shape, int(name.endswith("_mask")))
    return torch.randn(shape, generator=generator)
