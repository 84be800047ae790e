"""YAML that people write, read as plain data: text, numbers, lists and mappings, with the line of each."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from deepenc.errors import ConfigError

Place = tuple[str | int, ...]
"""Where something is in a document, as ``("attacks", 2, "epochs")``."""

SIZE, DEPTH, VALUES, DIGITS = 2**20, 32, 20_000, 100
"""Bytes, levels and values of a document at most, and characters of a number; an alias counts each time."""

_TAG = "tag:yaml.org,2002:"
_READERS: dict[str, tuple[str, Callable[[yaml.SafeLoader, yaml.ScalarNode], Any]]] = {
    f"{_TAG}str": ("text", lambda loader, node: loader.construct_yaml_str(node)),
    f"{_TAG}int": ("an integer", lambda loader, node: loader.construct_yaml_int(node)),
    f"{_TAG}float": ("a number", lambda loader, node: loader.construct_yaml_float(node)),
    f"{_TAG}bool": ("true or false", lambda loader, node: loader.construct_yaml_bool(node)),
    f"{_TAG}null": ("null", lambda loader, node: None),
}


def read_file(path: Path) -> tuple[Any, dict[Place, int]]:
    """Read a file: its content, and the line of everything in it.

    Raises:
        ConfigError: It cannot be read, or is not plain YAML.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"cannot read the configuration {path}: it is not a file; give a YAML file")
        with path.open("rb") as file:
            raw = file.read(SIZE + 1)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the configuration {path}: {problem}; give the path of a YAML file"
        ) from error
    if len(raw) > SIZE:
        raise ConfigError(f"{path}: expected a configuration of at most {SIZE} bytes, got more")
    try:
        return read(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read(text: str) -> tuple[Any, dict[Place, int]]:
    r"""Read a document: its content, and the line of everything in it.

    Dates stay text; mappings have text as keys, each once.

    Raises:
        ConfigError: It is not plain YAML.

    >>> read("steps: 3\nday: 2026-01-01")
    ({'steps': 3, 'day': '2026-01-01'}, {(): 1, ('steps',): 1, ('day',): 2})
    """
    loader = None
    try:
        loader = _Loader(text)
        plain = _Plain(loader)
        node = loader.get_single_node()
        return (None if node is None else plain.read(node, ())), plain.lines
    except _Refused as error:
        raise ConfigError(f"{_at(error)}: {error.problem}") from error
    except yaml.MarkedYAMLError as error:
        said = ", ".join(filter(None, (error.context, error.problem)))[:200]
        raise ConfigError(f"not YAML at {_at(error)}: {said}; repair that line") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"not YAML at line {line}: it holds a control character; remove it") from error
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, RecursionError) as error:
        # Escapes and directives with numbers that PyYAML does not check.
        line = 1 if loader is None else loader.line + 1
        raise ConfigError(f"not YAML at line {line}: {error}; repair that line") from error


class _Refused(yaml.MarkedYAMLError):
    """YAML, but not plain data."""


class _Loader(yaml.SafeLoader):
    """PyYAML's own, but no deeper and no longer than a document may be, and without dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > DEPTH or self._nodes > VALUES:
            raise _Refused(problem=_too_much(self._nodes), problem_mark=self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Plain:
    """Plain data of YAML's nodes, and the line of each."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.lines: dict[Place, int] = {}
        self._loader, self._count = loader, 0

    def read(self, node: yaml.Node, place: Place) -> Any:
        """The data of a node and of all under it."""
        self._count += 1
        if len(place) >= DEPTH or self._count > VALUES:  # by aliases, perhaps of itself
            _refuse(node, _too_much(self._count))
        self.lines[place] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.read(item, (*place, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, place)
        if isinstance(node, yaml.ScalarNode) and node.tag in _READERS:
            return self._scalar(node)
        return _refuse(node, f"the tag {reprlib.repr(node.tag)} is no plain data; remove it")

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    found = self.read(part, (*place, "<<"))
                    if not isinstance(found, dict):
                        _refuse(part, "expected a mapping to merge")
                    merged = found | merged
                continue
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                said = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
                _refuse(key_node, f"expected text before the colon, got {said}; put it in quotes")
            if key in own:  # YAML itself would quietly keep the last
                _refuse(key_node, f"{reprlib.repr(key)} is given twice; remove one")
            own[key] = self.read(value_node, (*place, key))
            self.lines[*place, key] = key_node.start_mark.line + 1
        return merged | own

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind, reader = _READERS.get(node.tag, _READERS[f"{_TAG}str"])
        if kind in ("an integer", "a number") and len(node.value) > DIGITS:
            _refuse(node, f"expected {kind} of at most {DIGITS} characters, got {len(node.value)}")
        try:
            value = reader(self._loader, node)
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError:
            _refuse(node, "half a character (a lone surrogate); write the character itself")
        except (ValueError, LookupError, OverflowError):
            _refuse(node, f"expected {kind}, got {reprlib.repr(node.value)}")
        if isinstance(value, int) and value.bit_length() > 64:
            _refuse(node, f"expected an integer of at most 64 bits, got {reprlib.repr(node.value)}")
        return value


def _too_much(values: int) -> str:
    if values > VALUES:
        return f"expected at most {VALUES} values, got more; aliases count as often as they are used"
    return f"nested more than {DEPTH} deep, or it contains itself"


def _refuse(at: yaml.Node, problem: str) -> NoReturn:
    raise _Refused(problem=problem, problem_mark=cast("yaml.Mark", at.start_mark))


def _at(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "some line"
