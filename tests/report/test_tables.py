from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepenc.arena.estimates import wilson
from deepenc.arena.record import Record
from deepenc.errors import StoreError
from deepenc.report.export import COLUMNS, write_csv
from deepenc.report.markdown import markdown, write_markdown
from deepenc.report.tables import ABSENT, report


def record(attack: str, key: int, correct: int | None, **more: Any) -> Record:
    fields = {
        "cell": f"{attack}-{key}-{more.get('defense', 'weak')}",
        "victim": "tiny",
        "defense": "weak",
        "attack": attack,
        "threat": "thief",
        "key": key,
        "repeat": 0,
        "protected": True,
        "state": "done",
        "score": None if correct is None else {"value": (correct) / 100, "examples": 100},
        "cost": {"samples": 12_800, "steps": 0, "seconds": 1.25},
        "memory": 0.042,
        "key_bits": 55.0,
    }
    return Record.model_validate(fields | more)


def reference(attack: str, kind: str, key: int, correct: int) -> Record:
    return record(
        attack, key, correct, reference=kind, defense="null", protected=False, memory=0.0, key_bits=0.0
    )


DETECTION = {
    "auc": 0.75,
    "average_precision": 0.5,
    "tpr": 0.25,
    "exact_sites": 1,
    "sites": 4,
    "bits_left": 12.0,
    "bits": 55.0,
}

RECORDS = [
    *(reference("null", "floor", key, 90) for key in (0, 1)),
    *(reference("scratch", "scratch", key, 50) for key in (0, 1)),
    *(record("null", key, 20, reference="floor") for key in (0, 1)),
    record("guess", 0, 60, detection=DETECTION),
    record("guess", 1, 80, detection=DETECTION),
    *(
        record(
            "broken",
            key,
            None,
            state="failed",
            reason="ValueError: too [bold]wide[/bold]\n\nTraceback\n  a line\n",
            cost=None,
        )
        for key in (0, 1)
    ),
    *(
        record("asks", key, None, state="unsupported", reason="needs labelled >= 5", cost=None)
        for key in (0, 1)
    ),
]


def shown(records: list[Record], width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report(records))
    return console.export_text()


def line(text: str, start: str) -> str:
    (found,) = [x for x in text.splitlines() if x.strip().startswith(start + " ")]
    return found


def test_a_cell_shows_what_was_measured() -> None:
    # By hand: keys 60 and 80 of 100; advantages (60 - 50) / 40 and (80 - 50) / 40.
    cells = line(shown(RECORDS), "guess").split()
    assert cells[:4] == ["guess", "70.0", "[60.0,", "80.0]"]
    assert cells[4:8] == ["80.0", "0.50", "[0.25,", "0.75]"]
    assert cells[8:12] == ["0.75", "0.25", "25%", "12"]
    assert cells[12:] == ["12.8k", "0", "1.2", "2", "done"]


@pytest.mark.parametrize(("attack", "state"), [("broken", "2 failed"), ("asks", "2 unsupported")])
def test_what_was_not_measured_is_absent_and_says_why(attack: str, state: str) -> None:
    text = shown(RECORDS)
    found = line(text, attack)
    assert found.rstrip().endswith(state)
    assert found.split()[1:-2] == [ABSENT] * 10
    assert not any(digit in found.replace(state, "") for digit in "0123456789")
    assert "broken: ValueError: too [bold]wide[/bold]" in text
    assert "asks: needs labelled >= 5" in text


def test_references_are_in_the_table() -> None:
    text = shown(RECORDS)
    assert "90.0" in line(text, "null (original)")
    assert "50.0" in line(text, "scratch")
    assert "20.0" in line(text, "null (as is)")


def test_the_overview_takes_the_strongest_attack_of_every_key() -> None:
    text = shown(RECORDS).partition("strongest attack on each key")[2]
    (found,) = [x for x in text.splitlines() if " weak " in x]
    for part in ("+4.2 %", "55", "70.0", "80.0", "0.75", "guess (2)"):
        assert part in found
    assert found.rstrip().endswith("4"), "the duels that did not end well are counted"


def test_no_column_is_dropped_where_the_terminal_is_narrow() -> None:
    text = shown(RECORDS, width=80)
    for table in (
        text.partition("strongest attack on each key")[0],
        text.partition("strongest attack on each key")[2],
    ):
        assert all(len(x) <= 80 for x in table.splitlines())
    head = " ".join(text.split())
    for column in ("state", "strongest", "advantage", "TPR"):
        assert column in head
    assert "0.25," in head and "0.75]" in head, "intervals are folded, not cut"
    assert "…" not in text


def test_names_are_not_read_as_markup() -> None:
    odd = [r.model_copy(update={"attack": "[red]x[/red]", "victim": "[b]v"}) for r in RECORDS[-4:-3]]
    text = shown(odd)
    assert "[red]x[/red]" in text
    assert "[b]v" in text


def test_an_empty_run_is_said_to_be_empty() -> None:
    assert "No duel" in shown([])


def test_lines_fit_120_columns_without_wrapping() -> None:
    assert max(len(x.rstrip()) for x in shown(RECORDS).splitlines()) <= 120


def test_csv_has_everything_and_leaves_the_rest_empty(tmp_path: Path) -> None:
    assert write_csv(RECORDS, tmp_path / "out.csv") == len(RECORDS)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(RECORDS)
    guess = next(r for r in rows if r["attack"] == "guess" and r["key"] == "1")
    assert (guess["score_value"], guess["detection_auc"], guess["cost_samples"]) == (
        "80",
        "0.75",
        "12800",
    )
    broken = next(r for r in rows if r["attack"] == "broken")
    assert broken["score_value"] == broken["detection_auc"] == broken["cost_seconds"] == ""
    assert "\nTraceback\n" in broken["reason"]


def test_the_columns_begin_as_they_always_did() -> None:
    first = ("version", "cell", "victim", "defense", "attack", "threat", "key", "repeat", "reference")
    assert COLUMNS[:9] == first, "readers of older files go by these names"


def test_a_csv_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        write_csv(RECORDS, tmp_path / "missing" / "out.csv")


def test_markdown_has_attacks_down_and_defenses_across() -> None:
    lines = markdown(RECORDS).splitlines()
    header = next(line for line in lines if line.startswith("| attack |"))
    column = header.strip("| ").split(" | ").index("weak (+4.2 %)")
    rows = [line.strip("| ").split(" | ") for line in reversed(lines)]
    cells = {row[0]: row for row in rows}
    assert cells["guess"][column].startswith("70.0 [60.0, 80.0] (80.0)")
    assert cells["null"][column].startswith("20.0 [13.")  # Wilson: both keys agree
    assert any("0.75, 25% (all: 0%, by p^L 0%), 12 of 55 bits" in line for line in lines)


def test_markdown_names_the_state_of_what_was_not_measured() -> None:
    assert "2 unsupported" in markdown([record("x", k, None, state="unsupported") for k in (0, 1)])


def test_unreliable_and_diverged_attacks_are_marked() -> None:
    fault = "on the planted weakness 'loud' it got no further than AUC 0.50"
    marked = [*RECORDS, record("blind", 0, 40, unreliable=fault, diverged=True)]
    words = " ".join(shown(marked, width=200).split())
    assert "1 done, 1 diverged, unreliable" in words
    assert f"blind is not reliable: {fault}" in words
    high = f"{100 * wilson(40, 100).high:.1f}"
    assert f"{high}]* |" in markdown(marked) and "*" not in markdown(RECORDS).replace("**", "")


def test_the_strongest_attack_is_named_with_its_advantage_and_cost() -> None:
    (row,) = [x for x in markdown(RECORDS).splitlines() if x.startswith("| tiny | thief | weak |")]
    # 60 and 80 of 100 between 50 from scratch and 90 for the original.
    assert "guess (2) | 70.0 [60.0, 80.0] (80.0) | 0.50 [0.25, 0.75] (0.75) | 12800 samples, 1.2 s |" in row


def test_top5_stands_beside_top1() -> None:
    score = {"value": 0.2, "examples": 100, "further": {"top-5": 0.5}}
    counted = [record("guess", key, None, score=score) for key in (0, 1)]
    assert "| 20.0 [13.3, 28.9]; top-5 50.0 |" in markdown(counted)


def test_markdown_to_nowhere(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="choose another file"):
        write_markdown(RECORDS, tmp_path / "none" / "x.md")
