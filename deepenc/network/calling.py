"""Call a network on an example, and see what its submodules are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from deepenc.errors import TraceError, near
from deepenc.network.guard import foreign, seeded
from deepenc.network.structure import fresh_tensors, named_tensors, replace_tensors
from deepenc.network.tracing.dry import DryRun


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


def fresh(example: Any) -> Any:
    """The example with clones of its tensors, which a network may write to."""
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    clones = {id(leaf): leaf.detach().clone() for leaf in leaves}
    return copy.deepcopy(example, clones)  # a tensor given twice stays one: some networks ask whether it is


def call(model: nn.Module, example: Any) -> Any:
    """Run a network on an example: a tensor, a tuple of arguments, a dict of keyword arguments, or both."""
    if isinstance(example, Arguments):
        args, kwargs = example.fresh()
        return model(*args, **kwargs)
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def call_with(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    inputs: Any,
    run: Callable[[nn.Module, Any], Any] = call,
) -> Any:
    """Run a network with other tensors, and leave it as it is.

    Args:
        network: The network.
        tensors: By state-dict name; the rest are its own.
        inputs: What `run` is given.
        run: Runs a network on inputs.
    """
    return functional_call(
        _Run(network, run), {f"network.{name}": t for name, t in tensors.items()}, (inputs,)
    )


class _Run(nn.Module):
    def __init__(self, network: nn.Module, run: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.network, self._run = network, run

    def forward(self, inputs: Any) -> Any:
        return self._run(self.network, inputs)


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
    with foreign(f"{type(model).__name__} cannot be copied", "give it a __deepcopy__ that copies all of it"):
        copied = replace_tensors(model, fresh_tensors(named_tensors(model)))
    seen = arguments_seen(copied, example, [path])
    if not seen[path]:
        raise TraceError(f"{type(model).__name__} does not call {path!r} on the example; give another scope")
    return part, seen[path][0]


def arguments_seen(model: nn.Module, example: Any, paths: Iterable[str]) -> dict[str, list[Arguments]]:
    """What submodules are given when the network runs in eval mode, by path, once for each call.

    Raises:
        TraceError: The network does not run on the example.
    """
    seen: dict[str, list[Arguments]] = {path: [] for path in paths}
    with (
        removed(list(recording(model, seen))),
        foreign(f"{type(model).__name__} does not run on the example"),
    ):
        model.eval()
        seeded()
        with torch.no_grad(), DryRun():
            call(model, fresh(example))
    return seen


def recording(model: nn.Module, seen: dict[str, list[Arguments]]) -> Iterator[RemovableHandle]:
    """Hooks that collect what submodules are given, by path."""
    for path, runs in seen.items():
        yield model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, runs=runs: runs.append(fresh(Arguments(args, kwargs))),
            with_kwargs=True,
        )


@contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Take hooks away at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
