"""What an attack leaves behind in its process is put back where that can be done: no other duel sees it.

Flags, hooks and settings of torch, numpy and Python are put back. Where that is not enough (a thread that
still runs, a function that was replaced), `residue` says so, and the process should judge no further duel.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.modules import module as modules
from torch.optim import optimizer as optimizers
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

log = logging.getLogger(__name__)

WATCHED = ("torch.nn.", "torch.optim.", "torch.autograd.", "deepenc", "attacks", "defenses", "numpy.random")
SINGLE = (
    "torch",
    "torch.nn",
    "torch.optim",
    "torch.autograd",
    "torch._tensor",
    "torch.functional",
    "numpy",
    "random",
    "math",
    "copy",
    "json",
    "hashlib",
    "time",
    "os",
    "builtins",
)
"""Modules, those that begin so and others, whose functions and classes must stay what they are."""

TORCH = str(Path(torch.__file__).parent)

_latest: str | None = None


def residue() -> str | None:
    """What the last duel left that cannot be put back, so that this process should judge no other."""
    return _latest


class _Setting(NamedTuple):
    """Something global that can be read and put back."""

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def _attribute(owner: Any, name: str) -> _Setting:
    return _Setting(f"{owner.__name__}.{name}", partial(getattr, owner, name), partial(setattr, owner, name))


def _contents(name: str, held: Any) -> _Setting:
    """A dict or list that is changed in place."""

    def put(before: Any) -> None:
        held.clear()
        (held.extend if isinstance(held, list) else held.update)(before)

    return _Setting(name, held.copy, put)


def _autocast(device: str) -> _Setting:
    def put(before: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
        torch.clear_autocast_cache()

    def get() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    return _Setting(f"autocast on {device}", get, put)


def _modes(stack: Callable[[], list[Any]]) -> _Setting:
    def get() -> list[Any]:
        return [mode for mode in stack() if not isinstance(mode, DeviceContext)]

    def put(before: list[Any]) -> None:
        while len(now := get()) > len(before):
            now[-1].__exit__(None, None, None)

    return _Setting("a mode of torch's", get, put)


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def _unnest(before: int) -> None:
    while _nesting() > before:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _flushes() -> bool:
    """Whether numbers below the smallest normal one become zero; torch can set this, but not say it."""
    return not float(torch.tensor([1e-310], dtype=torch.float64, device="cpu") * 1.0)


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _handle(before: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _alarmed() -> bool:
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _alarm(before: bool) -> None:
    if not before:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _filters() -> list[Any]:
    return list(warnings.filters)


def _filter(before: list[Any]) -> None:
    warnings.resetwarnings()  # tells Python that they changed
    warnings.filters[:] = before  # type: ignore[index]


SETTINGS = (
    _modes(dispatch_modes),
    _Setting("torch's default device", _default_device, torch.set_default_device),
    _modes(function_modes),
    _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch's threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("the grad mode", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("anomaly detection", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting(
        "deterministic algorithms",
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda before: torch.use_deterministic_algorithms(before[0], warn_only=before[1]),
    ),
    _autocast("cpu"),
    _autocast("cuda"),
    _Setting("the autocast around everything", _nesting, _unnest),
    _Setting("float32 precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.backends.cudnn, "enabled"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    _Setting("flushing of small numbers", _flushes, torch.set_flush_denormal),
    *(
        _contents(f"torch's {name}", held)
        for owner in (modules, optimizers)
        for name, held in vars(owner).items()
        if name.startswith("_global_") and isinstance(held, dict)
    ),
    _Setting("numpy's error handling", np.geterr, lambda before: np.seterr(**before)),
    _Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval),
    _Setting("garbage collection", gc.isenabled, lambda before: gc.enable() if before else gc.disable()),
    _Setting("the warnings' filters", _filters, _filter),
    _Setting("the signals' handlers", _handlers, _handle),
    _Setting("an alarm", _alarmed, _alarm),
    _Setting("the working directory", os.getcwd, os.chdir),
    _Setting("the logging level", lambda: logging.root.level, logging.root.setLevel),
    _Setting("disabled logging", lambda: logging.root.manager.disable, logging.disable),
    _attribute(sys, "stdout"),
    _attribute(sys, "stderr"),
    _contents("sys.path", sys.path),
    _contents("the environment", os.environ),
)


class Surroundings:
    """The process as it is now, to be restored after other people's code has run."""

    def __init__(self) -> None:
        self._values = [(setting, setting.get()) for setting in SETTINGS]
        self._threads = set(threading.enumerate())
        self._children = _children()
        self._code = [(place, dict(vars(place))) for place in _places()]
        self._pid = os.getpid()

    def restore(self) -> list[str]:
        """Put back what was changed since; says what.

        What cannot be put back is told by `residue` until the next call. A process that was forked since ends
        here: the duel is its parent's.
        """
        global _latest
        if os.getpid() != self._pid:
            os._exit(1)
        changed = [setting.name for setting, before in self._values if _reset(setting, before)]
        left = [*self._replaced(), *self._running()]
        if sys.stdout is not None and sys.stdout.closed:
            left.append("a closed standard output")
        _latest = ", ".join(left) or None
        return [*changed, *left]

    def _running(self) -> Iterator[str]:
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(0.1)
            if thread.is_alive():
                yield f"the thread {thread.name!r}, which runs on"
        if started := _children() - self._children:
            yield f"processes {sorted(started)}"

    def _replaced(self) -> Iterator[str]:
        """Functions and classes that were replaced; put back, though somebody may hold the others."""
        for place, before in self._code:
            now = vars(place)
            if [*map(id, before.values())] == [*map(id, now.values())]:
                continue
            for name, value in before.items():
                if _is_code(value) and now.get(name) is not value and not _by_torch(now.get(name)):
                    setattr(place, name, value)
                    yield f"another {place.__name__}.{name}"
            if isinstance(place, type):
                for name in now.keys() - before.keys():
                    if (
                        not name.startswith("__")
                        and _is_code(now[name])
                        and hasattr(super(place, place), name)
                    ):
                        delattr(place, name)
                        yield f"another {place.__name__}.{name}"


def _reset(setting: _Setting, before: Any) -> bool:
    """Put back one setting; says whether it had changed."""
    try:
        if setting.get() == before:
            return False
    except OSError:  # the working directory is gone
        pass
    setting.set(before)
    return True


def _is_code(value: object) -> bool:
    return inspect.isroutine(value) or isinstance(value, type | property | classmethod | staticmethod)


def _by_torch(value: object) -> bool:
    """Torch replaces some functions of its own, such as an optimiser's step when the first one is made."""
    code = getattr(value, "__code__", None)
    return isinstance(code, types.CodeType) and code.co_filename.startswith(TORCH)


@cache
def _places_of(module: types.ModuleType) -> list[types.ModuleType | type]:
    """A module, and the classes that it defines."""
    name = module.__name__
    return [module, *(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name)]


def _places() -> Iterator[types.ModuleType | type]:
    """Everything whose functions are watched."""
    for name, module in list(sys.modules.items()):
        if (name in SINGLE or name.startswith(WATCHED)) and isinstance(module, types.ModuleType):
            yield from _places_of(module)


def _children() -> set[int]:
    """Processes that this one has started and that still run; empty where the system does not tell."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return {int(child) for task in tasks for child in (task / "children").read_text().split()}
    except OSError:
        return set()
