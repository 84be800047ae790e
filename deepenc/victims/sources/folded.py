"""A victim that is given away without running statistics."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from torch import nn

from deepenc.analysis.folding import folding
from deepenc.errors import ConfigError
from deepenc.victims.data.splits import checksum
from deepenc.victims.sources.cifar import Cifar10ResNet20
from deepenc.victims.victim import Victim, VictimSource, source_of


def _source(value: Any) -> Any:
    """A text as on the command line, so that ``base=torchvision:resnet18`` can be meant, too."""
    return source_of(value) if isinstance(value, str) else value


class Folded(VictimSource):
    """Another victim with its BatchNorm folded into the layers before it: no running statistics to read.

    It computes what its base computes, up to rounding, on the same images in the same parts. A BatchNorm
    that does not directly follow a convolution or linear layer stays (DenseNet has such ones). The public
    network of a base that was fine-tuned from one is folded as well, as anyone can do it, so that its layers
    still correspond to the victim's; a public network with nothing to fold is told as it is. Whoever trains
    from scratch has BatchNorm: nobody would do without who is free to choose.
    """

    name: ClassVar[str] = "folded"

    base: Annotated[VictimSource, BeforeValidator(_source)] = Field(default_factory=Cifar10ResNet20)
    """The victim to fold (``cifar10-resnet56``, ``torchvision:model=resnet50``)."""

    @property
    def label(self) -> str:
        """The base, and that it is folded."""
        return f"{self.base.label} folded"

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        network, example = self.base.network(cache)
        return self._folded(network, example), example

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        base = self.base.load(cache)
        model = self._folded(base.model, base.example)
        public = None if base.public is None else folding(base.public, base.example).network
        told = ("folded", checksum(model.state_dict()), base.fingerprint)
        return replace(
            base,
            name=self.label,
            model=model,
            public=public,
            plain=base.model if base.plain is None else base.plain,
            fingerprint=hashlib.sha256(repr(told).encode()).hexdigest(),
        )

    def _folded(self, network: nn.Module, example: Any) -> nn.Module:
        """The folded network.

        Raises:
            ConfigError: It has no BatchNorm that can be folded.
        """
        made = folding(network, example)
        if made.folded:
            return made.network
        whys = sorted(set(made.left.values())) or ["it has none"]
        raise ConfigError(
            f"victim {self.name!r}: expected a `base` with a BatchNorm directly behind a convolution or a "
            f"linear layer, {self.base.label} has no such one: {'; '.join(whys)}. Take that victim as it is, "
            "or another `base`"
        )
