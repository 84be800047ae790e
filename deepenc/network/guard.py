"""Run copies of a network so that nothing outside of them remembers it."""

from __future__ import annotations

import functools
import random
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.errors import DeepencError, TraceError

_LOCK = threading.RLock()
_EMPTY = CellType()
_MADE: list[weakref.ref[Tensor]] = []
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set, deque}
_PLAIN = (int, float, str, type(None))
_LIBRARIES = ("torch", "torchvision", "numpy", "builtins", "typing", "abc", "collections", "enum", "deepenc")


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Follow and probe copies of a network, and leave everything else as it was.

    Tensors that a forward pass keeps outside the network (in attributes of its class, in variables of the
    module that defines it, in default arguments, closures and caches of functions) are taken out at the end,
    and what stood in their place is put back; so are the states of the random generators. One thread at a
    time, since all of this belongs to the process.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with _LOCK, torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices):
        states = random.getstate(), np.random.get_state()  # noqa: NPY002  # a network may use it
        fused = torch.backends.mha.get_fastpath_enabled()
        kept, first = [*_kept(model)], len(_MADE)
        # No transformer layer shall run as one operator, which cannot be followed.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            alive = {id(tensor) for made in _MADE[first:] if (tensor := made()) is not None}
            del _MADE[first:]
            for restore in kept:
                restore(alive)


def seeded() -> None:
    """Give each run of a copy the same random numbers; inside `guarded`, which puts the states back."""
    torch.default_generator.manual_seed(0)
    for generator in torch.cuda.default_generators:  # empty until CUDA is used
        generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


def note(result: Any) -> None:
    """Remember that a tensor, or several, was made by a copy that is followed or probed."""
    for part in result if isinstance(result, tuple | list) else (result,):
        if isinstance(part, Tensor):
            _MADE.append(weakref.ref(part))


@contextmanager
def foreign(name: str, remedy: str = "give an example input that the network accepts") -> Iterator[None]:
    """Turn whatever a network's own code raises into an error of ours.

    Args:
        name: What raised it, or what it did not do.
        remedy: What to do about it.

    Raises:
        TraceError: The code raised an exception that is none of ours.
    """
    try:
        yield
    except DeepencError:
        raise
    except (Exception, SystemExit) as error:  # the network's own code may raise anything
        raise TraceError(f"{name}: {type(error).__name__}: {first_line(error)}; {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or ["no message"])[0]


Restore = Callable[[set[int]], None]
"""Puts one thing back, if it holds any of the tensors with these ids."""


def _kept(model: nn.Module) -> Iterator[Restore]:
    """How to put back each thing outside a network that its code may keep something in."""
    kinds = {base: None for module in model.modules() for base in type(module).__mro__}
    seen: set[int] = set()
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            yield from _attributes(kind, seen)
            yield from _module(sys.modules.get(kind.__module__), seen)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, FunctionType) or (hasattr(value, "__dict__") and _is_object(value)):
                yield from _value(value, seen)


def _holds(value: Any, tensors: set[int]) -> bool:
    if type(value) in _CONTAINERS or isinstance(value, tuple):
        parts = [*value.values()] if isinstance(value, dict) else [*value]
        return any(_holds(part, tensors) for part in parts)
    return id(value) in tensors


def _attributes(kind: type, seen: set[int]) -> Iterator[Restore]:
    """The attributes of a class; counters and flags, too."""
    before = dict(vars(kind))

    def restore(tensors: set[int]) -> None:
        for name, value in [*vars(kind).items()]:
            old = before.get(name, before)
            if value is not old and (_holds(value, tensors) or isinstance(value, _PLAIN)):
                delattr(kind, name) if old is before else setattr(kind, name, old)

    yield restore
    for value in before.values():
        yield from _value(value, seen)


def _module(module: Any, seen: set[int]) -> Iterator[Restore]:
    """The variables of the module that defines a class or a function."""
    if isinstance(module, ModuleType) and id(module) not in seen:
        seen.add(id(module))
        named = {name for value in [*vars(module).values()] for name in _named_by(value, module.__name__)}
        yield from _container(vars(module), seen, named)
        for name, value in [*vars(module).items()]:
            if not name.startswith("__"):
                yield from _value(value, seen)


def _named_by(value: Any, module: str) -> Iterator[str]:
    """Names that the code of a function or of methods uses; other variables may be other threads'."""
    value = getattr(value, "__func__", getattr(value, "fget", value)) if _is_wrapper(value) else value
    if isinstance(value, FunctionType):
        codes = [value.__code__]
        while codes:
            code = codes.pop()
            yield from code.co_names
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    elif isinstance(value, type) and value.__module__ == module:
        for part in [*vars(value).values()]:
            if not isinstance(part, type):
                yield from _named_by(part, module)


def _value(value: Any, seen: set[int]) -> Iterator[Restore]:
    value = getattr(value, "__func__", getattr(value, "fget", value)) if _is_wrapper(value) else value
    if type(value) in _CONTAINERS:
        yield from _container(value, seen)
    elif isinstance(value, functools._lru_cache_wrapper):
        before = value.cache_info().currsize
        yield lambda _: value.cache_clear() if value.cache_info().currsize != before else None
        yield from _value(value.__wrapped__, seen)
    elif isinstance(value, FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, torch.Generator):
        yield functools.partial(_rewind, value, value.get_state())
    elif isinstance(value, ModuleType) and _is_users(value):
        yield from _module(value, seen)
    elif hasattr(value, "__dict__") and _is_object(value) and id(value) not in seen:
        seen.add(id(value))
        yield from _container(vars(value), seen)


def _is_object(value: Any) -> bool:
    """Whether a value is an object of a user's own class, not a network."""
    return _is_users(sys.modules.get(type(value).__module__)) and not isinstance(value, nn.Module | type)


def _is_wrapper(value: Any) -> bool:
    return isinstance(value, staticmethod | classmethod | property)


def _is_users(module: Any) -> bool:
    """Whether a module is a user's own, and not a library's."""
    path = getattr(module, "__file__", None) or ""
    return bool(path) and "site-packages" not in path and not path.startswith(sys.base_prefix)


def _container(value: Any, seen: set[int], counted: Container[Any] | None = None) -> Iterator[Restore]:
    """Entries of a container; of its plain values those under the keys `counted`, by default all."""
    if id(value) in seen:
        return
    seen.add(id(value))
    before, tensors = value.copy(), set[int]()

    def changed(key: Any, part: Any) -> bool:
        plain = isinstance(part, _PLAIN) and (counted is None or key in counted)
        return _holds(part, tensors) or (plain and part is not before.get(key, before))

    def restore(made: set[int]) -> None:
        nonlocal tensors
        tensors = made
        if isinstance(value, dict):
            for key in [key for key, part in [*value.items()] if changed(key, part)]:
                if key in before:
                    value[key] = before[key]
                else:
                    del value[key]
        elif _holds(value, tensors):
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(before)

    for part in [*before.values()] if isinstance(before, dict) else [*before]:
        if type(part) in _CONTAINERS:
            yield from _container(part, seen)
    yield restore


def _function(value: FunctionType, seen: set[int]) -> Iterator[Restore]:
    """Attributes, defaults and closure of a function, and the variables of where it was defined."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield from _container(value.__dict__, seen)
    for part in (
        *value.__dict__.values(),
        *(value.__defaults__ or ()),
        *(value.__kwdefaults__ or {}).values(),
    ):
        yield from _value(part, seen)
    for cell in value.__closure__ or ():
        if cell != _EMPTY:
            yield functools.partial(_refill, cell, cell.cell_contents)
            yield from _value(cell.cell_contents, seen)
    home = sys.modules.get(value.__module__ or "")
    if _is_users(home):
        yield from _module(home, seen)


def _rewind(generator: torch.Generator, state: Tensor, _: set[int]) -> None:
    generator.set_state(state)


def _refill(cell: CellType, content: Any, tensors: set[int]) -> None:
    if _holds(cell.cell_contents, tensors):
        cell.cell_contents = content
