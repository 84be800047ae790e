"""What a network is for: how a batch is run, what is lost by its answers, and what they are worth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepenc import trees
from deepenc.errors import ConfigError
from deepenc.network.calling import call
from deepenc.plugins import Plugin
from deepenc.tasks.examples import pairs

Offer = Literal["logits", "labels", "answers"]
"""What a task can give to an attack or a defense: scores of classes (`Task.logits`), one class for each
example (`Task.labels`), a model's answers as something to train on (`Task.answers`)."""

Outcome = NDArray[np.float64]
"""What became of one example, ``(numbers,)``."""


class Worth(NamedTuple):
    """What a network is worth on some examples.

    Attributes:
        value: The task's primary measure, in [0, 1]; higher is better.
        further: Further measures by name.
    """

    value: float
    further: dict[str, float]


class Task(Plugin):
    """What a network is for.

    Attributes:
        measure: Name of the primary measure.
        offers: What attacks and defenses may ask of the task.
        at_once: Examples that the judge runs at a time, at most.
        augments: Whether an image may be mirrored, moved and cropped without a change of its target.
        unit: What data are counted in, besides examples.
    """

    kind: ClassVar[str] = "task"
    measure: ClassVar[str]
    offers: ClassVar[frozenset[Offer]] = frozenset()
    augments: ClassVar[bool] = False
    at_once: ClassVar[int] = 256
    unit: ClassVar[str] = "examples"

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """The network's outputs for a batch of inputs."""
        return call(network, inputs)

    def units(self, inputs: Any) -> int:
        """How many of its `unit` a batch holds; default: its examples."""
        return trees.size(inputs)

    def collate(self, items: Sequence[Any]) -> tuple[Any, Any]:
        """Make a batch of items ``(input, target)``: inputs and targets.

        Raises:
            VictimError: The items differ in form.
        """
        return pairs(items)

    @abstractmethod
    def loss(
        self,
        network: nn.Module,
        inputs: Any,
        targets: Any,
        *,
        smoothing: float = 0.0,
        temperature: float = 1.0,
    ) -> Tensor:
        """What training minimises: the mean over the examples, differentiable, a scalar.

        Args:
            network: Called as `run` does, in the mode that it is in.
            inputs: Of a batch.
            targets: Of the batch, or what `answers` made of a model's outputs.
            smoothing: Share of each target that is spread over all classes, in [0, 1); tasks without classes
                take no notice.
            temperature: Divides class scores before the softmax; likewise.
        """

    @abstractmethod
    def outcomes(self, outputs: Any, targets: Any) -> list[Outcome]:
        """What became of each example, a few numbers from which `worth` is computed.

        An example of which the network says nothing readable (NaN) counts as wrong.
        """

    def worth(self, outcomes: Sequence[Outcome]) -> Worth:
        """The measures over some examples; default: the mean of the outcomes' first number.

        Args:
            outcomes: From `outcomes`, at least one.
        """
        return Worth(float(np.mean([outcome[0] for outcome in outcomes])), {})

    @abstractmethod
    def complaint(self, outputs: Any, inputs: Any) -> str | None:
        """What is wrong with the form of a network's outputs, in words: what was expected, and what came."""

    def unreadable(self, outputs: Any) -> list[bool]:
        """For each example, whether there is a NaN in the outputs."""
        if not _has_nan(outputs):
            return [False] * trees.size(outputs)
        return [_has_nan(one) for one in trees.examples_of(outputs)]

    def alike(self, first: Any, second: Any, tolerance: float) -> list[bool]:
        """Which examples have equal outputs, but for a share of the spread of an example's outputs."""
        pairs = zip(trees.examples_of(first), trees.examples_of(second), strict=True)
        return [_alike(one, other, tolerance) for one, other in pairs]

    def fitted(self, outputs: Any) -> Self:
        """The task with what it was not told read off a network's outputs, such as the number of classes."""
        return self

    def misfit(self, targets: Any) -> str | None:
        """What is wrong with the targets of a batch, in words; None where they fit the task."""
        return None

    def uninformative(self, targets: Any) -> str | None:
        """What all of some examples are or have, so that one answer fits every one, in words; None of others.

        Args:
            targets: Of a batch; they fit the task.
        """
        return None

    def head(self, network: nn.Module) -> tuple[str, ...]:
        """Paths of the layers that make the outputs, and are trained where only the head is; may be empty."""
        return ()

    def logits(self, outputs: Any) -> Tensor:
        """Scores of classes, ``(rows, classes)``, before the softmax; a row is an example or a part of one.

        Raises:
            ConfigError: The task does not offer them.
        """
        raise ConfigError(f"the task {self.name!r} has no class scores")

    def labels(self, targets: Any) -> Tensor:
        """The class of each example, ``(examples,)``, int64.

        Raises:
            ConfigError: The task does not offer them.
        """
        raise ConfigError(f"the task {self.name!r} has no class for each example")

    def answers(self, outputs: Any, *, temperature: float = 1.0) -> Any:
        """A model's outputs as targets, to train another network on.

        Args:
            outputs: Of the model.
            temperature: Divides class scores before the softmax.

        Raises:
            ConfigError: The task does not offer them.
        """
        raise ConfigError(f"the task {self.name!r} does not say how answers are learned from")

    def response(self, network: nn.Module, inputs: Any) -> Any:
        """What Equation 1 compares: the outputs, or, where they have no gradient, what leads to them."""
        return self.run(network, inputs)

    def numbers(self, outputs: Any) -> Tensor:
        """Outputs, or what `response` gives, as numbers that can be compared, ``(examples, numbers)``.

        Raises:
            ConfigError: The outputs are no tensors with a fixed number of values for each example.
        """
        if isinstance(outputs, Tensor) and outputs.ndim:
            return outputs.reshape(len(outputs), -1)
        found = trees.tensors(outputs)
        count = trees.size(outputs)
        if not found or isinstance(outputs, list) or any(t.shape[:1] != (count,) for t in found):
            raise ConfigError(
                f"the outputs of the task {self.name!r} are not a fixed number of values for each example: "
                f"{trees.described(outputs)}; measure a layer, as `features:NAME`"
            )
        return torch.cat([t.reshape(count, -1) for t in found], dim=1)


def _has_nan(tree: Any) -> bool:
    return any(bool(t.isnan().any()) for t in trees.tensors(tree) if t.is_floating_point())


def _alike(first: Any, second: Any, tolerance: float) -> bool:
    one, other = (trees.tensors(tree) for tree in (first, second))
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    return all(map(lambda a, b: _close(a, b, tolerance), one, other))


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal but for what rounding explains."""
    one, two = first.detach().double().cpu().flatten(), second.detach().double().cpu().flatten()
    if not one.numel():
        return True
    finite = one.isfinite() & two.isfinite()
    plain = torch.where(finite, one, 0)
    allowed = tolerance * (plain.amax() - plain.amin() + tolerance * plain.abs().amax())
    close = torch.where(finite, (one - two).abs() <= allowed, one == two)
    return bool((close | (one.isnan() & two.isnan())).all())
