"""The defender's plugin interfaces, and the defense they make together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from deepenc.errors import PluginError
from deepenc.network.arrangement import Arrangement
from deepenc.network.sites import Site, Slot
from deepenc.network.surgery import Layout
from deepenc.plugins import Plugin, get, invalid
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples, examples_of
from deepenc.tasks.task import Task

Allocation = dict[str, int]
"""Site name -> number of confusion channels, the paper's ΔC (Section 2.2)."""


@dataclass(frozen=True, eq=False)
class Original:
    """What the defender has before encrypting: everything but the key.

    Attributes:
        model: The victim's network, in eval mode; not to be changed.
        sites: Its sites.
        example: An example input: a tensor, or a tuple or dict of them.
        data: The defender's examples D of Equation 1, or None.
        task: What the network is for.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    example: Any
    data: Examples | None = None
    task: Task = field(default_factory=Classification)

    def __post_init__(self) -> None:
        """Take data in any form of `examples_of`."""
        object.__setattr__(self, "data", examples_of(self.data))


@dataclass(frozen=True, eq=False)
class Gap:
    """The confusion entries of one slot, about to be filled.

    Attributes:
        slot: Where in the victim's tensor the site's channels lie.
        victim: The victim's tensor, whole; not to be changed.
        shape: Shape of the values wanted: the widened tensor's, with ``count * block`` along ``slot.dim``.
        kept: For dimensions that are widened, where the victim's entries lie in them (`Layout.kept`).
    """

    slot: Slot
    victim: Tensor
    shape: tuple[int, ...]
    kept: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class Neurons:
    """The confusion channels of one site, about to be filled.

    Attributes:
        site: The victim's site.
        count: Number of confusion channels, ``>= 1``.
        gaps: One for each slot of the site, in its order.
    """

    site: Site
    count: int
    gaps: tuple[Gap, ...]

    @classmethod
    def of(cls, site: Site, layout: Layout, victim: Mapping[str, Tensor]) -> Self:
        """The confusion channels that a layout gives a site.

        Args:
            site: The victim's site.
            layout: Where the victim's entries go.
            victim: Its tensors by name; the gaps are those of the slots in them.
        """
        count, gaps = len(layout.positions[site.name]), []
        for slot in site.slots:
            if (tensor := victim.get(slot.tensor)) is not None:
                shape = list(layout.widened_shape(slot.tensor, tensor.shape))
                shape[slot.dim] = count * slot.block
                gaps.append(Gap(slot, tensor, tuple(shape), layout.kept(slot.tensor, tensor.shape)))
        return cls(site, count, tuple(gaps))


class Placement(Plugin):
    """Chooses how many confusion channels each site gets."""

    kind: ClassVar[str] = "placement"

    @property
    def wants_data(self) -> bool:
        """Whether it needs the defender's data."""
        return False

    @abstractmethod
    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Allocate confusion channels.

        Args:
            original: The victim and the defender's data.
            rng: The only source of randomness.

        Returns:
            A count ``>= 0`` for some or all of ``original.sites``; sites not named get none.
        """


class Weights(Plugin):
    """Fills confusion channels with weights."""

    kind: ClassVar[str] = "weights"

    per_tensor: ClassVar[bool] = False
    """Whether `fill` is called once for each tensor of a site, with the gaps of that tensor alone, so that a
    checkpoint larger than memory can be filled."""

    @abstractmethod
    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """Make the weights of one site's confusion channels; with ``per_tensor`` in one tensor.

        Args:
            neurons: The channels and the victim's tensors around them.
            rng: Randomness for these gaps.
            channels: For what belongs to a channel, not to one of its tensors: with ``per_tensor``, it gives
                the same numbers for each tensor of the site.

        Returns:
            For each gap, in order, a finite tensor of ``gap.shape``. Where two sites meet in one tensor,
            the later site's values are the ones that stay.
        """


def filled(
    weights: Weights, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
) -> Sequence[Tensor]:
    """What a plugin fills confusion channels with, validated.

    Raises:
        PluginError: It is not a finite tensor for each gap, of its shape and of the victim's dtype.
    """
    values, gaps = weights.fill(neurons, rng, channels), neurons.gaps
    blame = f"weights {weights.name!r}, site {neurons.site.name!r}"
    if len(values) != len(gaps):
        raise PluginError(f"{blame}: expected a tensor for each of the {len(gaps)} gaps, got {len(values)}")
    for gap, value in zip(gaps, values, strict=True):
        where = f"{blame}, tensor {gap.slot.tensor!r}"
        if not isinstance(value, Tensor) or value.shape != gap.shape or value.dtype != gap.victim.dtype:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PluginError(
                f"{where}: expected {gap.victim.dtype} {gap.shape}, got {got}; return values of `gap.shape` "
                "and of the victim's dtype"
            )
        if not torch.isfinite(value).all():
            raise PluginError(f"{where}: expected finite values, got NaN or infinity")
    return values


class Hardening(Plugin):
    """Improves confusion channels after they were filled, or what is released around them."""

    kind: ClassVar[str] = "hardening"

    follows: ClassVar[bool] = False
    """Whether `follow` moves the confusion channels of an earlier release, so that none need be drawn."""

    @property
    def wants_data(self) -> bool:
        """Whether it needs the defender's data."""
        return False

    def arrange(self, original: Original, rng: np.random.Generator) -> Arrangement:
        """Say how the victim's own channels shall be ordered and scaled before insertion; default: not.

        The core does it, proves that it changes nothing, and keeps it with the key.

        Args:
            original: The victim and the defender's data.
            rng: The only source of randomness.
        """
        return Arrangement()

    def withholds(self, original: Original) -> Collection[str]:
        """Names of tensors of the victim that `harden` may replace altogether; default: none.

        The true ones are kept with the key.

        Args:
            original: The victim and the defender's data.
        """
        return ()

    def harden(
        self, network: nn.Module, layout: Layout, original: Original, rng: np.random.Generator
    ) -> None:
        """Change the encrypted network in place: confusion entries, what is withheld, or (default) nothing.

        The core checks it.

        Args:
            network: The encrypted network.
            layout: Where the victim's entries lie in it.
            original: The victim, arranged as it is in the network, and the defender's data.
            rng: The only source of randomness.
        """

    def follow(
        self,
        network: nn.Module,
        layout: Layout,
        before: Mapping[str, Tensor],
        original: Original,
        rng: np.random.Generator,
    ) -> None:
        """Move an earlier release's confusion channels as the victim moved since; only where ``follows``.

        Steps before this one are not taken again, as the confusion channels carry what they did; those
        after it are.

        Args:
            network: The new release: the fine-tuned victim with the earlier release's confusion entries, to
                be changed in place.
            layout: Where the victim's entries lie in it, and in the earlier release.
            before: The earlier release's tensors, by name; what was withheld from it is the true one.
            original: As for `harden`.
            rng: The only source of randomness.
        """


class Defense(BaseModel):
    """Placement, weights and hardening under one name.

    Where a defense is expected, the name of a registered one will do (``"paper-samp"``), and so will a
    mapping; ``base`` in it names a registered defense whose other parts are taken over.

    Attributes:
        name: How tables call it.
        placement: Chooses the allocation; None leaves the network as it is (the null defense).
        weights: Fills the channels; needed where there is a placement.
        hardening: Applied in order after filling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "defense"

    name: str
    summary: str = ""
    placement: Placement | None = None
    weights: Weights | None = None
    hardening: tuple[Hardening, ...] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _from_spec(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        if data is None or isinstance(data, str):  # an unquoted `null` in YAML is the null defense
            data = get("defense", data or "null")
        elif isinstance(data, Mapping) and "base" in data:
            base = get("defense", data["base"])
            rest = {key: value for key, value in data.items() if key != "base"}
            data = {field: getattr(base, field) for field in cls.model_fields} | rest
        return handler(data)

    @classmethod
    def of(cls, spec: Defense | str | Mapping[str, Any] | None) -> Self:
        """The defense that a name or a mapping stands for.

        Raises:
            PluginError: It names an unknown plugin.
            ConfigError: It is invalid.
        """
        try:
            return cls.model_validate(spec)
        except ValidationError as error:
            raise invalid("defense", error, cls.model_fields) from error

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.placement is None) != (self.weights is None) or (self.hardening and not self.placement):
            raise ValueError("a defense needs placement and weights, or, as the null defense, nothing")
        return self

    @property
    def protects(self) -> bool:
        """Whether the defense inserts anything; the null defense does not."""
        return self.placement is not None

    @property
    def wants_data(self) -> bool:
        """Whether any part of it needs the defender's data."""
        steps = (*(() if self.placement is None else (self.placement,)), *self.hardening)
        return any(step.wants_data for step in steps)

    def plugins(self) -> tuple[Plugin, ...]:
        """The plugins it is made of."""
        parts = (self.placement, self.weights, *self.hardening)
        return tuple(part for part in parts if part is not None)

    def spec(self) -> dict[str, Any]:
        """The defense as plain data; also what every attacker is told (the algorithm is public)."""
        return {
            "name": self.name,
            "placement": self.placement.spec() if self.placement else None,
            "weights": self.weights.spec() if self.weights else None,
            "hardening": [step.spec() for step in self.hardening],
        }
