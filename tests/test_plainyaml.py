"""YAML that is no plain data, or more of it than a configuration has, is refused with its line, at once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepenc.errors import ConfigError
from deepenc.plainyaml import SIZE, read, read_file

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_data_comes_as_it_is_written() -> None:
    text = "a: [1, -2.5, true, null, 'x']\nday: 2024-99-99\nother: !!str 5\n"
    text += "base: &b {c: 1, d: 2}\nmore: {<<: *b, d: 3}\n"
    content, lines = read(text)
    assert content == {
        "a": [1, -2.5, True, None, "x"],
        "day": "2024-99-99",
        "other": "5",
        "base": {"c": 1, "d": 2},
        "more": {"c": 1, "d": 3},
    }
    assert lines["a", 2] == 1 and lines["day",] == 2 and lines["more", "d"] == 5
    assert read("")[0] is None


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: !!int x", 2, "expected an integer, got 'x'"),
        ("b: !!int ''", 1, "expected an integer"),
        ("b: !!float x", 1, "expected a number"),
        ("b: !!bool x", 1, "expected true or false"),
        ("b: !!timestamp x", 1, "no plain data"),
        ("b: !!python/name:os.system ''", 1, "no plain data"),
        ("b: !!binary '='", 1, "no plain data"),
        ("b: !own x", 1, "no plain data"),
        ("a:\n  b: " + "9" * 5000, 2, "an integer of at most"),
        ("a: 0x" + "f" * 5000, 1, "an integer of at most"),
        ("a: 99999999999999999999999", 1, "64 bits"),
        ("1: 2", 1, "put it in quotes"),
        ("a: {null: 2}", 1, "put it in quotes"),
        ("? [a]\n: 2", 1, "put it in quotes"),
        ("a: 1\na: 2", 2, "'a' is given twice"),
        ("a: " + "[" * 100_000, 1, "nested more than"),
        ("".join(" " * n + "a:\n" for n in range(2000)), 32, "nested more than"),
        ("a: &x [*x]", 1, "contains itself"),
        ("a: &x {<<: *x}", 1, "contains itself"),
        ("a: 1\n<<: 3", 2, "expected a mapping to merge"),
        (BOMB, 1, "aliases count"),
        ("a: 1\nb: [" + "1," * 30_000 + "]", 2, "values"),
        ('a: "\\ud800"', 1, "lone surrogate"),
        ('"\\ud800": 1', 1, "lone surrogate"),
        ('a: "\\UFFFFFFFF"', 1, "not YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", 1, "not YAML"),
        ("a: 1\nb: \x01", 2, "control character"),
        ("a: *b", 1, "undefined alias"),
        ("--- a\n--- b", 2, "single document"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_line(text: str, line: int, said: str) -> None:
    with pytest.raises(ConfigError, match=f"line {line}\\b") as caught:
        read(text)
    assert said in str(caught.value) and len(str(caught.value)) < 400


def test_only_a_file_of_a_sensible_size_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="it is not a file"):
            read_file(path)
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(SIZE * 1000)
    with pytest.raises(ConfigError, match="at most"):
        read_file(huge)
