"""Comparisons as they are shown: what differs, what ties, and of how many pairs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from rich.console import Console

from deepenc.arena.outcomes import pack
from deepenc.arena.record import Record
from deepenc.report.comparison import comparisons, comparisons_markdown
from deepenc.report.markdown import write_markdown


def records(defense: str, attack: str, chance: float, seed: int, keys: int = 4) -> list[Record]:
    drawn = (np.random.default_rng(seed).random((keys, 300)) < chance).astype(float)
    return [
        Record.model_validate(
            {"cell": f"{defense} {attack} {key}", "victim": "tiny", "defense": defense, "attack": attack}
            | {"threat": "thief", "key": key, "repeat": 0, "protected": True, "state": "done"}
            | {"score": {"value": row.mean(), "examples": 300, "outcomes": pack(row[:, None])}}
        )
        for key, row in enumerate(drawn)
    ]


RECORDS = [
    *records("tight", "guess", 0.2, 0),
    *records("tight", "tune", 0.3, 1),
    *records("loose", "guess", 0.9, 2),
    *records("loose", "tune", 0.9, 3),
]


def shown(found: list[Record]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparisons(found))
    return console.export_text()


def test_defenses_and_attacks_are_compared_and_ties_said() -> None:
    text = shown(RECORDS)
    title = "defenses, by the strongest attack on each key (beside the best; 1 pair in all)"
    assert title in " ".join(text.split())
    (defenses,) = [line for line in text.splitlines() if line.strip().startswith("loose")]
    assert defenses.split()[:2] == ["loose", "tight"] and defenses.rstrip().endswith("apart")
    tie = text.partition("attacks on loose")[2].partition("Difference")[0]
    assert "tie" in tie and "apart" not in tie
    assert "apart" in text.partition("attacks on tight")[2].partition("attacks on loose")[0]


def test_markdown_has_the_same() -> None:
    text = comparisons_markdown(RECORDS)
    assert "| loose | tight | +" in text and "| apart |" in text and "| tie |" in text


def test_two_keys_are_too_few_to_compare() -> None:
    few = [*records("a", "x", 0.2, 0, keys=2), *records("b", "x", 0.9, 1, keys=2)]
    assert "too few keys" in shown(few)


def test_one_defense_and_one_attack_are_nothing_to_compare(tmp_path: Path) -> None:
    alone = records("a", "x", 0.2, 0)
    assert "no two defenses" in shown(alone)
    write_markdown(alone, tmp_path / "out.md", compare=True)
    assert "Holm:" not in (tmp_path / "out.md").read_text()


def test_the_file_has_them_where_asked(tmp_path: Path) -> None:
    write_markdown(RECORDS, tmp_path / "out.md", compare=True)
    assert "| apart |" in (tmp_path / "out.md").read_text()
