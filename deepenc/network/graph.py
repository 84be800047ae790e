"""Follow a network's operators while it runs once, without weights.

The network is run on the meta device under a dispatch mode, which sees each ATen operator with its
arguments. Measured against torch.export this is 7 to 23 times faster, and it meets no graph breaks; where
the meta device will not do (values decide the control flow), the same tracer runs on the real tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from deepenc.errors import TraceError, near
from deepenc.network.admit import admit, tensors_in
from deepenc.network.axes import Axes, Axis, Channels
from deepenc.network.dry import DryRun
from deepenc.network.rules import apply
from deepenc.network.structure import named_tensors, replace_tensors


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor.

    Attributes:
        axes: One axis a dimension.
        state: Whether it depends on parameters, buffers and constants only, not on the input.
        scores: The channels over which activations were multiplied with one another to make it, as queries
            with keys; what attention then weighs by it belongs to the same heads.
    """

    axes: tuple[Axis, ...]
    state: bool
    scores: Axis = None


class Tracer(DryRun):
    """Applies the rule of each operator as it is called."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.axes = Axes()
        self.path: list[str] = []
        self.scores: Axis = None
        """Of the results of the operator at hand; a rule may change it."""
        self._names = names
        self._values = WeakTensorKeyDictionary()

    @property
    def where(self) -> str:
        """The innermost module that runs."""
        return self.path[-1] if self.path and self.path[-1] else "the network"

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a tensor not seen before is a parameter or a constant."""
        known: Value | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            name = self._names.get(id(tensor))
            if name is not None and tensor.is_floating_point():
                known = Value(
                    tuple(self.axes.own(name, d, size) for d, size in enumerate(tensor.shape)), True
                )
            else:
                known = Value((None,) * tensor.dim(), True)
            self._values[tensor] = known
        return known

    def enter(self, tensor: Tensor) -> None:
        """Declare an input of the network."""
        self._values[tensor] = Value((None,) * tensor.dim(), False)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(op, args, kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        given = [self.value(tensor) for tensor in tensors]
        self.scores = next((value.scores for value in given if value.scores is not None), None)
        values = apply(self, op, args, kwargs or {}, outputs)
        state = all(value.state for value in given)
        for output, axes in zip(outputs, values, strict=True):
            self._values[output] = Value(axes, state, self.scores)
        return result


def trace(model: nn.Module, example: Any) -> Channels:
    """Run the network once and tell its channels apart.

    Args:
        model: Any network; untouched. It may itself be on the meta device.
        example: A tensor, or a tuple (positional) or dict (keywords) of arguments.

    Raises:
        TraceError: The network does not run on the example; says in which module.
    """
    admit(model, example)
    own = named_tensors(model)
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    try:
        return _run(replace_tensors(model, meta), to_device(example, "meta"))
    except TraceError:
        if all(tensor.is_meta for tensor in own.values()):
            raise
    # Some networks look at values; shared parameters, so this costs activations only.
    own |= {name: own[name].clone() for name, _ in model.named_buffers()}
    return _run(replace_tensors(model, own), example)


class Arguments(NamedTuple):
    """An example of positional arguments and keywords both, as modules inside a network get them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> Arguments:
        """The same tensors, and copies of everything else: a cache is changed by being used."""
        tensors = {id(leaf): leaf for leaf in tree_leaves(tuple(self)) if isinstance(leaf, Tensor)}
        args, kwargs = copy.deepcopy((self.args, self.kwargs), tensors)
        return Arguments(args, kwargs)


def to_device(example: Any, device: torch.device | str) -> Any:
    """The example with all its tensors on a device."""
    moved: dict[int, Tensor] = {}  # a tensor given twice stays one: some networks ask whether it is

    def move(leaf: Any) -> Any:
        return moved.setdefault(id(leaf), leaf.to(device)) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, example)


def call(model: nn.Module, example: Any) -> Any:
    """Run a network on an example: a tensor, a tuple of arguments, a dict of keyword arguments, or both."""
    if isinstance(example, Arguments):
        args, kwargs = example.fresh()
        return model(*args, **kwargs)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def arguments_of(model: nn.Module, example: Any, path: str) -> tuple[nn.Module, Arguments]:
    """A submodule, and what it is given when the network runs on the example, the first time.

    Raises:
        TraceError: There is no such submodule, the network does not run, or not through it.
    """
    try:
        part = model.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in model.named_modules() if name]
        raise TraceError(f"{type(model).__name__} has no submodule {path!r}: {near(path, known)}") from None
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen = arguments_seen(replace_tensors(model, named_tensors(model) | buffers).eval(), example, [path])
    if not seen[path]:
        raise TraceError(f"{type(model).__name__} does not call {path!r} on the example; give another scope")
    return part, seen[path][0]


def arguments_seen(model: nn.Module, example: Any, paths: Iterable[str]) -> dict[str, list[Arguments]]:
    """What submodules are given when the network runs in eval mode, by path, once for each call.

    Raises:
        TraceError: The network does not run on the example.
    """
    seen: dict[str, list[Arguments]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: seen[path].append(Arguments(args, kwargs).fresh()),
            with_kwargs=True,
        )
        for path in seen
    ]
    try:
        with torch.no_grad():
            call(model, example)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example: {type(error).__name__}: "
            f"{_first_line(error)}; give an example input that the network accepts"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _run(model: nn.Module, example: Any) -> Channels:
    names: dict[int, str] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), name)  # a tied tensor goes by its first name
    tracer = Tracer(names)
    for path, module in model.named_modules():
        _follow(tracer, path, module)
    leaves: Iterable[Any] = tree_leaves(example)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tracer.enter(leaf)
    try:
        with torch.no_grad(), _layer_by_layer(), tracer:
            outputs = call(model.eval(), example)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} does not run on the example: {tracer.where} "
            f"({_kind(model, tracer.path)}) raised {type(error).__name__}: {_first_line(error)}; "
            "give an example input that the network accepts"
        ) from error
    _leave(tracer, outputs)
    used = {owner.tensor for owner in tracer.axes.owners}
    if any(p.is_meta and name not in used for name, p in model.named_parameters()):
        _train(tracer, model, example)
    return tracer.axes.solve()


def _leave(tracer: Tracer, outputs: Any) -> None:
    """Declare outputs of the network."""
    for tensor in tensors_in(outputs):
        for axis in tracer.value(tensor).axes:
            tracer.axes.fix(axis, "it is an output of the network")


def _train(tracer: Tracer, model: nn.Module, example: Any) -> None:
    """Follow what runs in training only, too, such as auxiliary heads: it must fit the same widths."""
    tracer.path.clear()
    if isinstance(example, Tensor):
        example = torch.cat([example, example])  # a BatchNorm wants more than one value
        tracer.enter(example)
    with suppress(Exception), torch.no_grad(), _layer_by_layer(), tracer:  # what does not run needs no room
        _leave(tracer, call(model.train(), example))


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Keep torch's transformer layers from running as one operator that cannot be followed."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _follow(tracer: Tracer, path: str, module: nn.Module) -> None:
    """Keep the tracer's path up to date; after an error it still points to the module that raised."""

    def enter(*_: Any) -> None:
        tracer.path.append(path)

    def leave(*_: Any) -> None:
        tracer.path.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _kind(model: nn.Module, path: list[str]) -> str:
    return type(model.get_submodule(path[-1])).__name__ if path else "before any module"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
