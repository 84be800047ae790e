"""Call a network on an example, and see what its submodules are given."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from deepenc.errors import TraceError, near
from deepenc.network.structure import named_tensors, replace_tensors


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
            f"{first_line(error)}; give an example input that the network accepts"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Take hooks away at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_line(error: Exception) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["no message"])[0]
