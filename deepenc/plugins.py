"""Plugins: what they are, where they are found, and how a line of text becomes one.

Built-in plugins are declared as entry points in pyproject.toml, exactly as anybody's are; a plugin in a
file of the user's own is loaded with `load_file`. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import reprlib
import sys
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from deepenc.errors import ConfigError, PluginError, near
from deepenc.plainyaml import read

GROUPS = {
    "attack": "deepenc.attacks",
    "placement": "deepenc.placements",
    "weights": "deepenc.weights",
    "hardening": "deepenc.hardenings",
    "defense": "deepenc.defenses",
    "victim": "deepenc.victims",
    "task": "deepenc.tasks",
    "battery": "deepenc.batteries",
}

_PREFIX = "deepenc_plugin_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Spec = str | Mapping[str, Any]
"""A plugin as text: ``"name"``, ``"name:field=value,..."`` or ``{"name": ..., field: value}``."""


class Plugin(BaseModel, ABC):
    """Base of the plugin interfaces.

    A plugin is frozen and keyword-only; its fields are its parameters, each with a default, bounds and a
    description. It keeps nothing from one call to the next. A field whose type is an interface
    (`Attack`, `Placement`, ...) takes a plugin or its `Spec`.

    Attributes:
        kind: Which interface, set by the interface.
        name: How configurations call the plugin, set by the plugin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: ClassVar[str]
    name: ClassVar[str]

    @model_validator(mode="wrap")
    @classmethod
    def _from_spec(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        if isinstance(data, cls):
            return data
        if "kind" in vars(cls) or inspect.isabstract(cls):  # an interface: the data name the plugin
            return cls.build(data)
        return handler(data)

    @classmethod
    def build(cls, spec: Any) -> Self:
        """Make a plugin of this interface from its `Spec`; raises as the function `build` does."""
        built = build(cls.kind, spec)
        if not isinstance(built, cls):
            raise PluginError(f"expected {cls.kind} plugins of {cls.__name__}, got {type(built).__name__}")
        return built

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    def spec(self) -> dict[str, Any]:
        """The plugin as plain data, from which `build` makes an equal one."""
        return {"name": self.name} | {
            field: _plain(getattr(self, field)) for field in type(self).model_fields
        }


def parts_of(value: Any) -> Iterator[Plugin]:
    """All plugins in a value: itself, those in its fields, and in theirs."""
    if isinstance(value, Plugin):
        yield value
    if isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from parts_of(getattr(value, field))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from parts_of(item)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        own = getattr(value, "spec", None)
        return own() if callable(own) else value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


# Plugins of the user's files, by kind and name, beside those of the entry points.
_loaded: dict[tuple[str, str], type[Plugin]] = {}


@cache
def _declared(kind: str) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUPS[kind]):
        if point.name in found and found[point.name].value != point.value:
            raise PluginError(
                f"{kind} {point.name!r} is declared twice: by {found[point.name].value} and by "
                f"{point.value}; uninstall one of the packages or rename its entry point"
            )
        found[point.name] = point
    return found


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind, sorted; imports none of them."""
    return sorted({*_declared(kind), *(name for k, name in _loaded if k == kind)})


def get(kind: str, name: str) -> Any:
    """The registered class (for a defense, the registered object) of that name.

    Raises:
        PluginError: No such plugin, or it does not import, or it is not what its entry point says.
    """
    if not isinstance(name, str):
        raise PluginError(f"expected the name of a {kind}, got {reprlib.repr(name)}")
    if (kind, name) in _loaded:
        return _loaded[kind, name]
    if name not in _declared(kind):
        raise PluginError(f"unknown {kind} {name!r}: {near(name, names(kind))}")
    point = _declared(kind)[name]
    try:
        found = point.load()
    except Exception as error:
        raise PluginError(
            f"{kind} {name!r} ({point.value}) does not import: {type(error).__name__}: {error}; "
            "repair or uninstall the package that declares it"
        ) from error
    cls = found if inspect.isclass(found) else type(found)
    if not issubclass(cls, BaseModel) or getattr(cls, "kind", None) != kind:
        raise PluginError(f"entry point {point.value} is no {kind}: subclass the interface; see docs/")
    if issubclass(cls, Plugin):
        _check(cls, point.value)
    if getattr(found, "name", None) != name:
        raise PluginError(
            f"{kind} {name!r} ({point.value}) calls itself {getattr(found, 'name', None)!r}; "
            "make its `name` and the entry point's agree"
        )
    return found


def build(kind: str, spec: Any) -> Any:
    """Make a plugin from its `Spec`.

    Raises:
        PluginError: The name is unknown.
        ConfigError: A parameter is unknown or out of bounds.

    >>> parse("finetune:epochs=3,lr=0.01")
    {'name': 'finetune', 'epochs': 3, 'lr': 0.01}
    """
    if isinstance(spec, Plugin):
        return spec
    fields = parse(spec)
    name = fields.pop("name")
    cls = get(kind, name)
    try:
        return cls(**fields)
    except ValidationError as error:
        raise invalid(f"{kind} {name!r}", error, cls.model_fields) from error


def parse(spec: Any) -> dict[str, Any]:
    """Split a spec into a name and parameters.

    Raises:
        ConfigError: It has no name, or is neither text nor a mapping.
    """
    if spec is None:  # an unquoted `null` in YAML means the plugin of that name
        spec = "null"
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        fields: dict[str, Any] = {"name": name}
        for item in filter(None, rest.split(",")):
            key, separator, value = item.partition("=")
            if not separator:
                raise ConfigError(f"expected name:field=value,... got {spec!r}")
            try:
                fields[key.strip()], _ = read(value)
            except ConfigError as error:
                shown = reprlib.repr(value)
                raise ConfigError(f"cannot read the value {shown} of {key.strip()!r}: {error}") from error
        return fields
    if isinstance(spec, Mapping):
        called = "null" if "name" in spec and spec["name"] is None else spec.get("name")
        if not isinstance(called, str) or not all(isinstance(key, str) for key in spec):
            raise ConfigError(
                f"expected a mapping of text with a `name` of text, got {reprlib.repr(dict(spec))}"
            )
        return {**spec, "name": called}
    raise ConfigError(f"expected a name or a mapping, got {type(spec).__name__}: {spec!r}")


def invalid(blame: str, error: ValidationError, known: Iterable[str]) -> ConfigError | PluginError:
    """What to raise for a pydantic error: a `PluginError` where all it complains of are plugins.

    Args:
        blame: What was validated.
        error: The error.
        known: Names of its fields.
    """
    causes = [detail.get("ctx", {}).get("error") for detail in error.errors(include_url=False)]
    kind = PluginError if all(isinstance(cause, PluginError) for cause in causes) else ConfigError
    return kind(f"{blame}: {explain(error, known)}")


def explain(error: ValidationError, known: Iterable[str]) -> str:
    """A pydantic error in one line: which field, what was wrong, which name may have been meant."""
    parts = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(step) for step in detail["loc"])
        said = complaint(detail, known, "parameter")
        parts.append(said if not where or detail["type"] == "extra_forbidden" else f"{where}: {said}")
    return "; ".join(parts)


def complaint(detail: ErrorDetails, known: Iterable[str], what: str) -> str:
    """One of pydantic's complaints in words.

    Args:
        detail: The complaint.
        known: Names of the fields beside the one it is about.
        what: How a field is called.
    """
    match detail["type"]:
        case "extra_forbidden":
            name = str(detail["loc"][-1])
            hint = near(name, known) if known else f"it has no {what}s"
            return f"unknown {what} {name!r}: {hint}"
        case "missing":
            return f"this {what} is missing; add it"
        case "value_error" | "assertion_error":
            return detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    expected = detail["msg"].replace("Input should be ", "expected ").replace("tuple", "list")
    return f"{expected}, got {reprlib.repr(detail['input'])}"


def register(cls: type[Plugin], source: str) -> None:
    """Add a plugin class to the registry of its kind.

    Args:
        cls: A concrete subclass of an interface.
        source: Where it comes from, for messages.

    Raises:
        PluginError: It has no name, or the name is taken, or its methods do not fit the interface.
    """
    _check(cls, source)
    name = cls.name
    taken = _loaded.get((cls.kind, name))
    if (taken is not None and taken.__module__ != cls.__module__) or name in _declared(cls.kind):
        raise PluginError(f"{source}: the {cls.kind} name {name!r} is taken; choose another")
    _loaded[cls.kind, name] = cls


def _check(cls: type[Plugin], source: str) -> None:
    """Refuse a class whose name or methods do not fit its interface, before anything of it runs."""
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(
            f'{source}: {cls.__name__} needs a name; add `name: ClassVar[str] = "..."` to the class'
        )
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"{source}: {cls.__name__} is called {name!r}; expected letters, digits, '-', '_' and '.' only: "
            "configurations name plugins in a line of text"
        )
    interface = next(base for base in cls.__mro__ if "kind" in vars(base))
    for method, promised in vars(interface).items():
        own = inspect.getattr_static(cls, method)
        if method.startswith("_") or own is promised:
            if getattr(promised, "__isabstractmethod__", False):
                wanted = f"{method}{_parameters(promised)}"
                raise PluginError(
                    f"{source}: {cls.kind} {name!r} has no method {wanted}; add it to {cls.__name__}"
                )
        elif isinstance(promised, property) and inspect.isfunction(own):
            raise PluginError(
                f"{source}: {cls.kind} {name!r} defines {method} as a method; put @property in front of it"
            )
        elif inspect.isfunction(promised) and not _takes(own, promised):
            given = _parameters(own) if inspect.isfunction(own) else f", a {type(own).__name__}"
            raise PluginError(
                f"{source}: {cls.kind} {name!r} has the method {method}{given}; the arena calls it as "
                f"{method}{_parameters(promised)}: give {cls.__name__}.{method} these parameters"
            )


def _parameters(function: Any) -> str:
    return f"({', '.join(inspect.signature(function).parameters)})"


def _takes(own: Any, promised: Any) -> bool:
    """Whether a method can be called as the interface's is."""
    if not inspect.isfunction(own):
        return False
    wanted = inspect.signature(promised).parameters.values()
    places = [p for p in wanted if p.kind is not p.KEYWORD_ONLY]
    names = [p.name for p in wanted if p.kind is p.KEYWORD_ONLY]
    try:
        inspect.signature(own).bind(*places, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def load_file(path: str | Path) -> list[type[Plugin]]:
    """Import a user's Python file and register the plugins it defines.

    Raises:
        PluginError: The file does not exist, does not import, or defines no plugin.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise PluginError(f"no plugin file at {path}; give the path of a Python file")
    module_name = f"{_PREFIX}{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        module = _import(module_name, path)
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls)
        and issubclass(cls, Plugin)
        and cls.__module__ == module_name
        and (not inspect.isabstract(cls) or "name" in vars(cls))  # without a name, a base for others
    ]
    before = dict(_loaded)
    try:
        if not found:
            raise PluginError(
                f"{path} defines no plugin; subclass Attack, Placement, Weights, Hardening, Task or "
                "VictimSource, and give the class a name"
            )
        for cls in found:
            register(cls, str(path))
    except PluginError:  # all of a file, or nothing
        _loaded.clear()
        _loaded.update(before)
        del sys.modules[module_name]
        raise
    return found


def loaded_files() -> list[Path]:
    """The files that `load_file` has loaded, for another process to load."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_PREFIX)]
    return [Path(module.__file__) for module in modules if module.__file__]


def _import(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pydantic resolves annotations through it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise PluginError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
