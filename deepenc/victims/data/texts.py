"""Texts with classes, from files with a text, a tab and a class number in each line; characters as tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepenc.errors import VictimError
from deepenc.tasks.examples import Examples
from deepenc.victims.data.images import expect_file

PADDING, UNKNOWN, FIRST = 0, 1, 2
"""Ids of what fills a row up, of characters that are not in the vocabulary, and of what begins each text."""


class Text(NamedTuple):
    """A text and its class."""

    words: str
    label: int

    @property
    def content(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.words.encode(errors="surrogatepass")).digest()


def read_texts(path: Path, classes: int) -> list[Text]:
    """The texts of a file (UTF-8), empty lines left out.

    Args:
        path: The file.
        classes: Their number; a line's class is from 0 to below it.

    Raises:
        VictimError: The file is missing or unusable; says which line.
    """
    expect_file(path, "a file of texts")
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise VictimError(f"cannot read {path} ({error}); give a text file in UTF-8") from error
    for number, line in enumerate(lines, 1):
        words, tab, label = line.rstrip("\r").rpartition("\t")
        if not line.strip():
            continue
        if not (tab and words.strip() and label.isdecimal() and int(label) < classes):
            raise VictimError(
                f"{path}, line {number}: expected a text, a tab and a class from 0 to {classes - 1}, got "
                f"{line[:60]!r}; mend or remove the line"
            )
        found.append(Text(words, int(label)))
    return found


def vocabulary(texts: Sequence[Text], size: int) -> dict[str, int]:
    """Ids of the most frequent characters, from 3; of equally frequent ones the first by code point."""
    counts = Counter(character for text in texts for character in text.words)
    order = sorted(counts, key=lambda character: (-counts[character], character))
    return {character: at for at, character in enumerate(order[: size - FIRST - 1], FIRST + 1)}


def encoded(texts: Sequence[Text], ids: Mapping[str, int], length: int) -> Examples:
    """Texts as rows of ids with their masks, int64 ``(texts, length)``, cut or filled up to one length."""
    rows = torch.full((len(texts), length), PADDING)
    for row, text in zip(rows, texts, strict=True):
        own = [FIRST, *(ids.get(character, UNKNOWN) for character in text.words)][:length]
        row[: len(own)] = torch.tensor(own)
    inputs: dict[str, Tensor] = {"input_ids": rows, "attention_mask": (rows != PADDING).long()}
    return Examples(inputs, torch.tensor([text.label for text in texts], dtype=torch.int64))
