"""The checks that every plugin must pass, for the built-in ones and for yours; `deepenc check` runs them."""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.arena.case import Attack
from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
from deepenc.errors import DeepencError, PluginError
from deepenc.plugins import Plugin

Body = Callable[[], None]


class Broken(DeepencError):
    """A promise of its interface that a plugin does not keep."""


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        name: What is promised.
        body: Raises where the promise is broken.
    """

    name: str
    body: Body


@dataclass(frozen=True)
class Result:
    """How a check went; ``detail`` says what was wrong, empty where nothing was."""

    name: str
    passed: bool
    detail: str = ""


def checks_for(plugin: Any) -> list[Check]:
    """The checks for a plugin, by its interface.

    Args:
        plugin: An attack, placement, weights or hardening, with the parameters to be checked, or its class
            (then with its defaults), or a whole defense.

    Raises:
        PluginError: There are no checks for its kind.
    """
    from deepenc.arena import contract_attacks, contract_defenses

    if inspect.isclass(plugin):
        plugin = _with_defaults(plugin)
    match plugin:
        case Attack():
            return [*_plugin_checks(plugin), *contract_attacks.attack_checks(plugin)]
        case Placement():
            return [*_plugin_checks(plugin), *contract_defenses.placement_checks(plugin)]
        case Weights():
            return [*_plugin_checks(plugin), *contract_defenses.weights_checks(plugin)]
        case Hardening():
            return [*_plugin_checks(plugin), *contract_defenses.hardening_checks(plugin)]
        case Defense():
            return contract_defenses.defense_checks(plugin)
    raise PluginError(f"expected an attack, placement, weights, hardening or defense; got {plugin!r}")


def run_checks(plugin: Any) -> list[Result]:
    """Run all checks for a plugin (see `checks_for`); quick, on a tiny network with random weights."""
    return [_run(check) for check in checks_for(plugin)]


def _run(check: Check) -> Result:
    try:
        with watched():
            check.body()
    except DeepencError as error:
        return Result(check.name, False, f"{type(error).__name__}: {error}")
    except Exception as error:  # a plugin under check may raise anything; the others are still checked
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}:{where.lineno}"
        return Result(check.name, False, f"{type(error).__name__}: {error} ({place})")
    return Result(check.name, True)


def _with_defaults(cls: type) -> Any:
    if not issubclass(cls, Plugin):
        raise PluginError(f"expected a plugin class, got {cls.__name__}")
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    if required or inspect.isabstract(cls):
        lacks = f"defaults for {required}" if required else f"{sorted(cls.__abstractmethods__)}"
        raise PluginError(f"{cls.__name__} needs {lacks}; every parameter must have a default")
    return cls()


def _plugin_checks(plugin: Plugin) -> list[Check]:
    return [
        Check("has a name and a docstring whose first line says what it does", lambda: _described(plugin)),
        Check("is frozen, with a default for every parameter", lambda: _frozen(plugin)),
        Check("comes back equal from its own description", lambda: _round_trip(plugin)),
    ]


def _described(plugin: Plugin) -> None:
    cls = type(plugin)
    if not isinstance(getattr(cls, "name", None), str) or not cls.name:
        raise Broken('add `name: ClassVar[str] = "..."` to the class')
    own = cls.__doc__ or ""
    if not own.strip().partition("\n")[0].strip():
        raise Broken(f"{cls.__name__} has no docstring of its own; its first line is shown by `deepenc list`")


def _frozen(plugin: Plugin) -> None:
    cls = type(plugin)
    if not cls.model_config.get("frozen") or cls.model_config.get("extra") != "forbid":
        raise Broken(f"{cls.__name__} must stay frozen and refuse unknown parameters")
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    if required:
        raise Broken(f"parameters {required} have no default")


def _round_trip(plugin: Plugin) -> None:
    fields = {key: value for key, value in plugin.spec().items() if key != "name"}
    again = type(plugin)(**fields)
    if again != plugin:
        raise Broken(f"expected {plugin!r}, got {again!r}; parameters must be plain data or plugins")
    hash(plugin)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Restore the global generators and the grad mode; the list says at the end what was done to them."""
    before, grad = _global_state(), torch.is_grad_enabled()
    done: list[str] = []
    try:
        yield done
    finally:
        after = _global_state()
        if changed := [kind for kind in before if not _same(before[kind], after[kind])]:
            done.append(
                f"drew from the global generators of {', '.join(changed)}: draw from the generator that it "
                "is given, or inside torch.random.fork_rng()"
            )
        if torch.is_grad_enabled() != grad:
            done.append("left the grad mode changed: use `with torch.no_grad():`")
        torch.set_grad_enabled(grad)
        torch.set_rng_state(before["torch"])
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])  # noqa: NPY002 - the very state that is guarded


def _global_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
    }


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return bool(np.array_equal(first, second))
    if isinstance(first, tuple):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a network's state dict."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same, bit for bit (NaN equals NaN)."""
    return sorted(
        name
        for name in {*first, *second}
        if name not in first or name not in second or not _equal(first[name], second[name])
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.nan_to_num(), second.nan_to_num()) and torch.equal(first.isnan(), second.isnan())
