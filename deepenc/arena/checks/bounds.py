"""A plugin at the ends of what its parameters may be."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from annotated_types import Ge, Le
from pydantic import ValidationError

from deepenc.arena.checks.base import Broken
from deepenc.errors import ClaimError, DeepencError
from deepenc.plugins import Plugin


def ends(plugin: Plugin) -> Iterator[tuple[str, Any]]:
    """Each parameter with each end of its range, with both truth values, or with each of its words."""
    for name, field in type(plugin).model_fields.items():
        values = [m.ge if isinstance(m, Ge) else m.le for m in field.metadata if isinstance(m, Ge | Le)]
        if field.annotation is bool:
            values = [False, True]
        elif typing.get_origin(field.annotation) is Literal:
            values = list(typing.get_args(field.annotation))
        yield from ((name, value) for value in values if value != getattr(plugin, name))


def check_ends(plugin: Plugin, act: Callable[[Any], object]) -> None:
    """See that a plugin does something, or refuses in words, wherever its parameters say that it may be.

    Args:
        plugin: With the parameters that stay.
        act: Uses a plugin.

    Raises:
        Broken: It raises what no user can understand, or claims what cannot be judged.
    """
    own = {name: getattr(plugin, name) for name in type(plugin).model_fields}
    for name, value in ends(plugin):
        try:
            changed = type(plugin)(**own | {name: value})
        except ValidationError:
            continue  # it does not fit the other parameters, and that is said
        try:
            act(changed)
        except DeepencError as error:
            if isinstance(error, ClaimError | Broken):
                raise Broken(f"with {name}={value!r}: {error}") from error
        except Exception as error:  # whatever a plugin raises that is none of ours
            raise Broken(
                f"with {name}={value!r} it raises {type(error).__name__}: {error}; narrow the "
                f"bounds of {name!r}, or refuse in words (deepenc.errors)"
            ) from error
