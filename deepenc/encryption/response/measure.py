"""What Equation 1 compares: the outputs of two networks, or what a layer inside them makes of the images."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from deepenc import trees
from deepenc.errors import ConfigError, near
from deepenc.network.calling import call
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout
from deepenc.tasks.classification import Classification
from deepenc.tasks.task import Task

KNOWN = "'logits', 'probabilities', 'features', or 'features:NAME' with the name of a layer"


def _known(text: str) -> str:
    kind, colon, path = text.partition(":")
    if (kind == "features" and bool(colon) == bool(path)) or text in ("logits", "probabilities"):
        return text
    raise ValueError(f"expected {KNOWN}, got {text!r}")


Measure = Annotated[str, AfterValidator(_known)]
"""What is compared: the network's outputs (``logits``), their softmax (``probabilities``), what goes into
its last ``Linear`` (``features``), or what comes out of a layer (``features:layer3``)."""


class ResponseReader:
    """Reads what is compared out of a network.

    The last Linear is the one that the victim calls last; a layer that is called several times counts as
    it was the last time. Confusion channels among the inputs of that Linear are left out, for the victim
    has none to compare them with; outputs of a layer that holds some cannot be compared.

    Args:
        victim: In eval mode.
        measure: What to read.
        images: A batch of a few, on which the victim runs once where its last Linear is looked for.
        task: What the network is for.

    Raises:
        ConfigError: No such measure, or no such layer.
    """

    def __init__(self, victim: nn.Module, measure: Measure, images: Any, task: Task | None = None) -> None:
        try:
            kind, _, self._path = _known(measure).partition(":")
        except ValueError as error:
            raise ConfigError(f"measure: {error}") from None
        self._measure, self._inside = measure, kind == "features"
        self._task = task or Classification()
        self._weights: dict[str, Tensor] = {}
        if measure == "features":
            self._path = _last_linear(victim, images)
            own = named_tensors(victim)
            weight = own[f"{self._path}.weight" if self._path else "weight"]
            self._weights = {name: tensor for name, tensor in own.items() if tensor is weight}

    def __call__(self, network: nn.Module, images: Any, layout: Layout | None = None) -> Tensor:
        """What is compared, ``(images, values)``, 64 bits.

        Args:
            network: In eval mode; the victim, or an encrypted network.
            images: A batch.
            layout: Where the victim's channels lie in it.

        Raises:
            ConfigError: The network is in training mode, or makes no tensor ``(images, ...)``.
        """
        return self.values(self.tensor(network, images), layout)

    def tensor(self, network: nn.Module, images: Any) -> Tensor:
        """What the network itself makes of it, as it is; see `values`."""
        _evaluating(network)
        out = self._caught(network, images) if self._inside else self._outputs(network, images)
        count = trees.size(images)
        if not isinstance(out, Tensor) or out.shape[:1] != (count,):
            what = f"a layer {self._path!r}" if self._inside else "a network"
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            remedy = "name another layer" if self._inside else "wrap it in one that does"
            raise ConfigError(
                f"expected {what} that maps {count} examples to a tensor (examples, ...), got {got}; {remedy}"
            )
        return out

    def _outputs(self, network: nn.Module, images: Any) -> Any:
        out = self._task.response(network, images)
        return out if isinstance(out, Tensor) else self._task.numbers(out)

    def values(self, out: Tensor, layout: Layout | None = None) -> Tensor:
        """What is compared of a tensor from `tensor`, ``(images, values)``, 64 bits."""
        real = None if layout is None else self._real(layout)
        if real is not None:
            out = out.index_select(-1, real.to(out.device))
        out = out.double()
        if self._measure == "probabilities":
            out = self._task.logits(out).softmax(1).reshape(len(out), -1)
        return out.flatten(1) if out.ndim > 1 else out[:, None]

    def _real(self, layout: Layout) -> Tensor | None:
        """The victim's channels among the inputs of its last Linear; none where all are."""
        for name, weight in self._weights.items():
            kept = layout.kept(name, weight.shape)
            if 1 in kept:
                return kept[1]
        return None

    def comparable(self, clean: Tensor, changed: Tensor) -> None:
        """Refuse values of two networks, ``(images, values)``, that are not as many.

        Raises:
            ConfigError: They are not.
        """
        if clean.shape != changed.shape:
            layer = f"what is measured at layer {self._path!r}" if self._inside else "the outputs"
            remedy = "give key.layout()" if self._weights else "name a layer behind the site"
            raise ConfigError(
                f"expected {layer} to be as many values as the victim's {clean.shape[1]}, got "
                f"{changed.shape[1]}: confusion channels are among them; {remedy}"
            )

    def _caught(self, network: nn.Module, images: Any) -> Any:
        module, caught = _layer(network, self._path), list[Any]()

        # What runs later may write in place.
        def note(value: Any) -> None:
            caught[:] = [value.clone() if isinstance(value, Tensor) else value]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(args[0] if args else kwargs["input"])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            note(output)

        if self._weights:
            hook = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = module.register_forward_hook(after)
        try:
            call(network, images)
        finally:
            hook.remove()
        if not caught:
            raise ConfigError(
                f"{type(network).__name__} does not call the layer {self._path!r}; name another one"
            )
        return caught[0]


def _evaluating(network: nn.Module) -> None:
    if network.training:
        raise ConfigError("expected a network in eval mode, got one in training mode; call .eval() first")


def _layer(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in network.named_modules() if name]
        raise ConfigError(
            f"measure: {type(network).__name__} has no layer {path!r}: {near(path, known)}"
        ) from None


def _last_linear(victim: nn.Module, images: Any) -> str:
    _evaluating(victim)
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.append(path))
        for path, module in victim.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            call(victim, images)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ConfigError(
            f"the measure 'features' is what goes into the last Linear, and {type(victim).__name__} calls "
            "none; name a layer, as in 'features:layer3'"
        )
    return called[-1]
