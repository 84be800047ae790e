"""The YAML file of an experiment or a search, read and validated; every complaint has its field and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, overload

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deepenc.arena.plan import Experiment
from deepenc.errors import ConfigError
from deepenc.plainyaml import Place, read_file
from deepenc.plugins import complaint
from deepenc.study.search import Search

Model = TypeVar("Model", bound=BaseModel)

_COMMANDS: dict[type[BaseModel], tuple[str, set[str], str]] = {
    Experiment: ("deepenc run", {"victims", "defenses"}, "configs/quickstart.yaml"),
    Search: ("deepenc tune", {"space", "objectives"}, "configs/tune_digits.yaml"),
}
"""For each model the command that takes it, fields that no other has, and an example."""


@overload
def load(path: str | Path) -> Experiment: ...


@overload
def load(path: str | Path, model: type[Model]) -> Model: ...


def load(path: str | Path, model: type[BaseModel] = Experiment) -> BaseModel:
    """Read a configuration.

    Args:
        path: A YAML file with the fields of the model.
        model: What it describes: an `Experiment` or a `Search`.

    Raises:
        ConfigError: The file cannot be read, is not plain YAML, or is invalid; a line for each complaint.
    """
    path = Path(path)
    content, lines = read_file(path)
    command, _, example = _COMMANDS[model]
    if not isinstance(content, dict):
        got = "nothing" if content is None else type(content).__name__
        fields = ", ".join(sorted(model.model_fields))
        raise ConfigError(f"{path}: expected fields such as {fields}, got {got}; see {example}")
    for other, theirs, _ in _COMMANDS.values():
        if other != command and theirs & content.keys() and not _COMMANDS[model][1] & content.keys():
            raise ConfigError(f"{path}: this is for `{other}`, not for `{command}`: {other} {path}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        complaints = list(dict.fromkeys(_complaints(error, model, content, lines)))
    count = "one thing" if len(complaints) == 1 else f"{len(complaints)} things"
    told = "\n".join(f"  {where}: {text}" for _, where, text in sorted(complaints, key=lambda said: said[0]))
    raise ConfigError(f"{path}: {count} to repair\n{told}")


def load_search(path: str | Path) -> Search:
    """Read a search; see `load`."""
    return load(path, Search)


def _complaints(
    error: ValidationError, model: type[BaseModel], content: Any, lines: dict[Place, int]
) -> Iterator[tuple[int, str, str]]:
    """Of each complaint its line, its place in words, and what is wrong."""
    details = error.errors(include_url=False)
    places = [_place(detail) for detail in details]
    for detail, place in zip(details, places, strict=True):
        # A list counts as too short where one of its items is wrong: that is told already.
        if detail["type"] == "too_short" and any(p != place and p[: len(place)] == place for p in places):
            continue
        known = _fields(model, detail["loc"][:-1])
        name, _ = _where(place, detail["type"] == "missing", content, lines)
        _, line = _where(place + _inside(detail), False, content, lines)
        text = complaint(detail, known, "field")
        yield line, f"{_cut(name, 200)} (line {line})" if line else _cut(name, 200), _cut(text, 1000)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} …"


def _place(detail: ErrorDetails) -> Place:
    return detail["loc"] + getattr(detail.get("ctx", {}).get("error"), "place", ())


def _inside(detail: ErrorDetails) -> Place:
    """Where the first complaint is inside a plugin, which says in one text all that it complains of."""
    cause = getattr(detail.get("ctx", {}).get("error"), "__cause__", None)
    if not isinstance(cause, ValidationError):
        return ()
    first = cause.errors(include_url=False)[0]
    return _place(first) + _inside(first)


def _where(place: Place, missing: bool, content: Any, lines: dict[Place, int]) -> tuple[str, int]:
    """A place as people write it, and its line; steps that the file does not hold are left out.

    Pydantic's places have more: the ``attack`` that a short entry stands for, the types of a union.
    """
    name = ""
    at: Place = ()
    for step in place:
        if isinstance(content, dict) and isinstance(step, int) and step < len(content):
            step = list(content)[step]  # a mapping that is read as a list of its entries
        holds = (
            step in content
            if isinstance(content, dict)
            else isinstance(content, list) and step in range(len(content))
        )
        if holds:
            content, at = content[step], (*at, step)
        if holds or (missing and step == place[-1]):
            name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else str(step)
    line = next((lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in lines), 0)
    return name or "the file", line


def _fields(annotation: Any, place: Place) -> list[str]:
    """Names of the fields of the model that a place leads to; none where it leads to something else."""
    models = [
        found for found in _flat(annotation) if isinstance(found, type) and issubclass(found, BaseModel)
    ]
    if not place:
        return [field for model in models for field in model.model_fields]
    if isinstance(place[0], int):
        return _fields(annotation, place[1:])
    fields = [model.model_fields[place[0]] for model in models if place[0] in model.model_fields]
    return [name for field in fields for name in _fields(field.annotation, place[1:])]


def _flat(annotation: Any) -> list[Any]:
    return [annotation, *(inner for argument in get_args(annotation) for inner in _flat(argument))]
