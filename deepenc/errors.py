"""Every error that deepenc raises on purpose, and any error as text.

Each says what was expected, what it got, and the remedy.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable

LIMIT = 20_000
"""Characters of a reason; more is cut out of its middle."""

SUMMARY = 2_000
"""Characters of the first part, which says what was raised."""


class DeepencError(Exception):
    """Root of all deepenc errors."""


class ConfigError(DeepencError, ValueError):
    """A configuration or an argument that is invalid.

    It is a `ValueError`, as is `PluginError`, so that pydantic collects those that validators raise.

    Args:
        message: What was expected, what it got, and the remedy.
        place: Where in what was validated, as fields and indices.
    """

    def __init__(self, message: str, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


class PluginError(DeepencError, ValueError):
    """A plugin that cannot be found, loaded, or trusted to keep its interface."""


class TraceError(DeepencError):
    """A network whose operators cannot be followed."""


class SiteError(DeepencError):
    """A site that does not fit the tensors it is used with."""


class KeyFileError(DeepencError):
    """A key that is wrong, altered, or sealed with another passphrase."""


class CheckpointError(DeepencError):
    """A file of an encrypted network that is cut, altered, or of another format."""


class VictimError(DeepencError):
    """A victim whose weights or data are missing or unusable."""


class OutOfBudget(DeepencError):
    """An attack that asked for more than its threat model allows."""


class ClaimError(DeepencError):
    """A claim that does not have the form the arena judges."""


class StoreError(DeepencError):
    """A run's folder or database that cannot be read or written."""


class WorkerError(DeepencError):
    """A worker process that cannot start, or cannot read what it is given."""


def near(name: str, known: Iterable[str]) -> str:
    """Say which of the known names may have been meant.

    >>> near("colisions", ["collisions", "norms"])
    "did you mean 'collisions'? Known: collisions, norms"
    """
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = "did you mean " + " or ".join(repr(m) for m in matches) + "? " if matches else ""
    return hint + ("Known: " + ", ".join(known) if known else "There is none")


def explain(error: BaseException) -> str:
    """What was raised, and below it the traceback."""
    try:
        raised = "".join(traceback.format_exception_only(error)).strip()
        trace = "".join(traceback.format_exception(error))
    except Exception:  # an error that cannot even be looked at
        return f"{type(error).__name__}, whose text cannot be read"
    return clean(f"{clean(raised, SUMMARY)}\n\n{trace}")


def clean(text: str, limit: int = LIMIT) -> str:
    r"""Text without lone surrogates and control characters, of a limited length.

    >>> clean("cannot read \udcff\x1b[31m")
    'cannot read \\udcff\\x1b[31m'
    """
    text = _cut(text, 2 * limit)
    if not text.isascii() or not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)
    return _cut(text, limit)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = (limit - 60) // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
