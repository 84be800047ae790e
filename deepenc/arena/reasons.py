"""Why something failed, as text that fits into a record, a database and a terminal."""

from __future__ import annotations

import traceback

LIMIT = 20_000
"""Characters of a reason; more is cut out of its middle."""

SUMMARY = 2_000
"""Characters of the first part, which says what was raised."""


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
