"""The checks that every plugin must pass, for the built-in ones and for yours; `deepenc check` runs them."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deepenc.arena.case import Attack
from deepenc.arena.checks.attacks import attack_checks
from deepenc.arena.checks.base import Broken, Check, NothingPromised, watched
from deepenc.arena.checks.defenses import defense_checks, hardening_checks, placement_checks, weights_checks
from deepenc.arena.checks.victims import victim_checks
from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
from deepenc.errors import DeepencError, PluginError
from deepenc.plugins import Plugin
from deepenc.victims.victim import VictimSource


@dataclass(frozen=True)
class Result:
    """How a check went.

    Attributes:
        name: What is promised.
        passed: Whether the promise is kept, or none was made.
        detail: What was wrong, or why there was nothing to check.
        cause: What was raised, without where.
        checked: Whether there was something to check.
        repeated: Whether an earlier check has failed by the same fault.
    """

    name: str
    passed: bool
    detail: str = ""
    cause: str = ""
    checked: bool = True
    repeated: bool = False


def checks_for(plugin: Any) -> list[Check]:
    """The checks for a plugin, by its interface.

    Args:
        plugin: An attack, placement, weights, hardening or victim, with the parameters to be checked, or its
            class (then with its defaults), or a whole defense.

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
        case VictimSource():
            return [*_plugin_checks(plugin), *victim_checks(plugin)]
        case Defense():
            return defense_checks(plugin)
    raise PluginError(f"expected an attack, placement, weights, hardening, victim or defense; got {plugin!r}")


def run_checks(plugin: Any) -> list[Result]:
    """Run all checks for a plugin (see `checks_for`); quick, on a tiny network with random weights."""
    results: list[Result] = []
    for check in checks_for(plugin):
        results.append(once(run_check(check), results))
    return results


def run_check(check: Check) -> Result:
    """Run one check, whatever the plugin does there."""
    try:
        with watched():
            check.body()
    except NothingPromised as error:
        return Result(check.name, True, str(error), checked=False)
    except DeepencError as error:
        return Result(
            check.name, False, f"{type(error).__name__}: {error}", f"{type(error).__name__}: {error}"
        )
    except (Exception, SystemExit) as error:  # a plugin may raise anything; the others are still checked
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = f"{type(error).__name__}: {error}"
        return Result(check.name, False, f"{cause} ({where.filename}:{where.lineno})", cause)
    return Result(check.name, True)


def once(result: Result, earlier: Sequence[Result]) -> Result:
    """The result, in short where an earlier check has told the same fault."""
    for other in earlier:
        if other.cause and not result.passed and other.cause in result.detail:
            return replace(result, detail=f"as above: {other.name}", repeated=True)
    return result


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
        Check("says what each parameter is", lambda: _parameters_described(plugin)),
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


def _parameters_described(plugin: Plugin) -> None:
    if bare := [name for name, field in type(plugin).model_fields.items() if not field.description]:
        raise Broken(f"parameters {bare} have no docstring; write one below each")


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
