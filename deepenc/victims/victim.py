"""A victim: a trained network, what it is for, and examples in parts that never overlap."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deepenc.errors import ConfigError
from deepenc.network.factory import Factory
from deepenc.plugins import Plugin, parse
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Victim:
    """The original network and its data.

    Attributes:
        name: How tables call it.
        model: The network, in eval mode, on the CPU.
        task: What the network is for.
        defender: The defender's examples (D of Equation 1); the network may have been trained on them.
        attacker: The attacker's examples; the network was not trained on them.
        judge: The judge's examples; the network was not trained on them, and no attacker sees them.
        fingerprint: Identifies the weights and the data (SHA-256, hex).
        public: The public network that the model was fine-tuned from, in eval mode, on the CPU; None where
            there is none.
        plain: A network of the structure in which the model is trained, where it is given away in another
            (folded); None where it is the model's own. Only the structure counts: it is what somebody
            starts from who steals nothing.
        trained: Whether the model was trained for the task; where it has a fresh head it knows nothing of it,
            and the defender's examples are of another task, with its targets.
        scope: Submodule in which sites are looked for (see `deepenc.find_sites`); default: all of it.
        streams: Whether residual streams count as sites as well (see `deepenc.find_sites`).
    """

    name: str
    model: nn.Module
    task: Task
    defender: Examples
    attacker: Examples
    judge: Examples
    fingerprint: str
    public: nn.Module | None = None
    plain: nn.Module | None = None
    trained: bool = True
    scope: str = ""
    streams: bool = False

    @property
    def example(self) -> Any:
        """One input, as a batch of one; a copy."""
        one = self.defender.batch([0]).inputs
        return (one,) if isinstance(one, list) else one


class VictimSource(Plugin):
    """Loads or trains a victim."""

    kind: ClassVar[str] = "victim"

    @property
    def label(self) -> str:
        """How tables call the victim: its name, and more where a parameter chooses the network."""
        return self.name

    @property
    def random(self) -> bool:
        """Whether the network's weights are random, so that there is nothing to protect."""
        return False

    @abstractmethod
    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """Get the network alone; needs no images where its weights are to be had without.

        Args:
            cache: As for `load`.

        Returns:
            The network, in eval mode, on the CPU, and an example input, as a batch of one: a tensor, or a
            tuple or dict of them.

        Raises:
            VictimError: The weights are missing or unusable; says where they were looked for.
        """

    def structure(self) -> Factory | None:
        """How the network's structure is made on another machine; None where no factory makes it."""
        return None

    @abstractmethod
    def load(self, cache: Path) -> Victim:
        """Get the victim.

        Args:
            cache: Folder for what is trained or converted once; created where missing.

        Raises:
            VictimError: Weights or data are missing or unusable; says where they were looked for.
        """


def source_of(text: str) -> VictimSource:
    """The victim that a line of text stands for.

    Args:
        text: As in a configuration (``name``, ``name:field=value,...``), or a factory and fields of the
            victim ``network``: ``timm:vit_tiny_patch16_224``, ``package.module:function,example=1x3x32x32``.

    Raises:
        PluginError: The name is unknown.
        ConfigError: It is empty, or a parameter is unknown or invalid.
    """
    head, colon, rest = text.partition(":")
    first, _, fields = rest.partition(",")
    if not head or (colon and not rest):
        raise ConfigError(
            f"expected a victim, such as digits-resnet, torchvision:resnet18 or my_models:build, got {text!r}"
        )
    if first and "=" not in first:
        source = VictimSource.build(parse(f"network:{fields}") | {"factory": f"{head}:{first}"})
    else:
        source = VictimSource.build(text)
    return source
