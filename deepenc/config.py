"""An experiment's YAML file, read and validated; every complaint says which field and which line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from deepenc.arena.plan import Entry, Experiment
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, DeepencError, near
from deepenc.plugins import build

Path_ = tuple[str | int, ...]
"""Where something is in the file, as ``("attacks", 2, "epochs")``."""

_LISTS: dict[str, tuple[Callable[[Any], Any], type[BaseModel] | None]] = {
    "victims": (lambda spec: build("victim", spec), None),
    "defenses": (Defense.model_validate, Defense),
    "attacks": (Entry.model_validate, Entry),
    "threats": (Threat.model_validate, Threat),
}


def load(path: str | Path) -> Experiment:
    """Read an experiment.

    Args:
        path: A YAML file with the fields of `Experiment`.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or says something that cannot be meant; one line
            for each complaint.
    """
    path = Path(path)
    content, lines = _read(path)
    complaints = list(_item_complaints(content))
    if not complaints:
        try:
            return Experiment.model_validate(content)
        except ValidationError as error:
            complaints = list(_explain((), error, Experiment))
    count = "one thing" if len(complaints) == 1 else f"{len(complaints)} things"
    told = "\n".join(f"  {_where(place, lines)}: {text}" for place, text in complaints)
    raise ConfigError(f"{path}: {count} to repair\n{told}")


def _read(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    """The file's content, and the line of everything in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the configuration {path}: {problem}; give the path of a YAML file"
        ) from error
    lines: dict[Path_, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            lines.update(_lines((), node))
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}: not YAML at {place}: {said}; repair that line") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not plain YAML: {str(error) or 'it contains itself'}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected fields such as {sorted(Experiment.model_fields)}, "
            f"got {'nothing' if content is None else type(content).__name__}; see configs/quickstart.yaml"
        )
    return content, lines


def _lines(place: Path_, node: yaml.Node) -> Iterator[tuple[Path_, int]]:
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines((*place, index), item)
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:  # YAML itself would quietly keep the last
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            yield from _lines((*place, key.value), value)
            yield (*place, key.value), key.start_mark.line + 1


def _item_complaints(content: dict[str, Any]) -> Iterator[tuple[Path_, str]]:
    """Complaints about fields and listed plugins: each is tried alone, so that all are told at once."""
    known = Experiment.model_fields
    for field in content:
        if field not in known:
            yield (field,), f"unknown field {field!r}: {near(str(field), known)}"
    for field, about in known.items():
        if about.is_required() and field not in content:
            yield (field,), "this field is missing; add it"
    for field, (make, model) in _LISTS.items():
        items = content.get(field)
        if not isinstance(items, list):
            continue  # the experiment's own validation says so
        for index, item in enumerate(items):
            try:
                make(item)
            except ValidationError as error:
                yield from _explain((field, index), error, model)
            except DeepencError as error:
                yield (field, index), str(error)


def _explain(
    place: Path_, error: ValidationError, model: type[BaseModel] | None
) -> Iterator[tuple[Path_, str]]:
    known = list(model.model_fields) if model else []
    for detail in error.errors(include_url=False):
        at = (*place, *detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                text = f"unknown field {detail['loc'][-1]!r}: {near(str(detail['loc'][-1]), known)}"
            case "missing":
                text = "this field is missing; add it"
            case "value_error":
                text = detail["msg"].removeprefix("Value error, ")
            case _:
                expected = detail["msg"].replace("Input should be ", "expected ").replace("tuple", "list")
                text = f"{expected}, got {detail['input']!r}"
        yield at, text


def _where(place: Path_, lines: dict[Path_, int]) -> str:
    name = ""
    for step in place:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else str(step)
    known = next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), None)
    return " ".join(filter(None, (name or "the file", f"(line {known})" if known else "")))
