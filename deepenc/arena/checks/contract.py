"""The checks that every plugin must pass, for the built-in ones and for yours; `deepenc check` runs them."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass
from typing import Any

from deepenc.arena.case import Attack
from deepenc.arena.checks.attacks import attack_checks
from deepenc.arena.checks.base import Broken, Check, watched
from deepenc.arena.checks.defenses import defense_checks, hardening_checks, placement_checks, weights_checks
from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
from deepenc.errors import DeepencError, PluginError
from deepenc.plugins import Plugin


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
    if inspect.isclass(plugin):
        plugin = _with_defaults(plugin)
    match plugin:
        case Attack():
            return [*_plugin_checks(plugin), *attack_checks(plugin)]
        case Placement():
            return [*_plugin_checks(plugin), *placement_checks(plugin)]
        case Weights():
            return [*_plugin_checks(plugin), *weights_checks(plugin)]
        case Hardening():
            return [*_plugin_checks(plugin), *hardening_checks(plugin)]
        case Defense():
            return defense_checks(plugin)
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
