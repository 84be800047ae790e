"""Why something failed: text that every record, database and terminal takes."""

import pytest

from deepenc.errors import LIMIT, clean, explain


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Liar(Exception):
    def __str__(self):
        return 5


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return explain(caught)


def test_what_was_raised_comes_first_then_where():
    first, empty, *rest = raised(ValueError("too wide")).splitlines()
    assert (first, empty) == ("ValueError: too wide", "")
    assert rest[0].startswith("Traceback") and "in raised" in rest[1]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("\ud800 cannot read \udcff"),
        RuntimeError("a\0b\x1b[31m[/red]\x07\r\x85"),
        Unspeakable(),
        Liar(),
        RuntimeError("x" * 50_000_000),
        RuntimeError("\ud800" * 1_000_000),
        RuntimeError("line\n" * 1_000_000),
        ExceptionGroup("many", [ValueError("\ud800")] * 1000),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        RecursionError("deep"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error.args)[:20]!a}",
)
def test_every_text_can_be_stored_and_shown(error):
    text = raised(error)
    assert len(text) <= LIMIT
    assert text.encode() and "\0" not in text and "\x1b" not in text
    assert type(error).__name__ in text.splitlines()[0]
    assert clean(text) == text, "what is stored comes back equal"


def test_both_ends_of_a_long_text_are_kept():
    text = clean("begin" + "x" * 10**6 + "end")
    assert text.startswith("begin") and text.endswith("end") and "characters left out" in text


def test_other_languages_stay():
    assert clean("größer als 5\t模型\n") == "größer als 5\t模型\n"
