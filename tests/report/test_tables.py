from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.special import expit, logit
from scipy.stats import t

from deepenc.arena.estimates.estimate import unseen, wilson
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

KEYS = (0, 1, 2)
RIGHT = (60, 80, 70)
"""Of 100, by the attack that guesses; the references have 50 and 90."""

RECORDS = [
    *(reference("null", "floor", key, 90) for key in KEYS),
    *(reference("scratch", "scratch", key, 50) for key in KEYS),
    *(record("null", key, 20, reference="floor") for key in KEYS),
    *(record("guess", key, RIGHT[key], detection=DETECTION) for key in KEYS),
    *(
        record(
            "broken",
            key,
            None,
            state="failed",
            reason="ValueError: too [bold]wide[/bold]\n\nTraceback\n  a line\n",
            cost=None,
        )
        for key in KEYS
    ),
    *(
        record("asks", key, None, state="unsupported", reason="needs labelled >= 5", cost=None)
        for key in KEYS
    ),
]

# Student's interval of 0.6, 0.8 and 0.7 on the logit scale, its tails by the rule of the shares; of the
# advantages (0.6 - 0.5) / 0.4 and so on in the middle, where tails are even.
SPREAD = 0.1 / math.sqrt(3)
LOW, HIGH = (
    expit(logit(0.7) - side * SPREAD / 0.21 * t.isf(0.025 * (1 - side * 0.9 * 0.4**2), 2)) for side in (1, -1)
)
HALF = 0.25 / math.sqrt(3) * t.isf(0.025, 2)
SCORE = f"[{100 * LOW:.1f}, {100 * HIGH:.1f}]k"
GAIN = f"[{0.5 - HALF:.2f}, {0.5 + HALF:.2f}]k"


def shown(records: list[Record], width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report(records))
    return console.export_text()


def line(text: str, start: str) -> str:
    (found,) = [x for x in text.splitlines() if x.strip().startswith(start + " ")]
    return found


def test_a_cell_shows_what_was_measured() -> None:
    cells = line(shown(RECORDS).partition("detected")[0], "guess").split()
    assert cells[:4] == ["guess", "70.0", *SCORE.split()]
    assert cells[4:8] == ["80.0", "0.50", *GAIN.split()]
    assert cells[8:12] == ["0.75", "0.25", "25%", "12"]
    assert cells[12:] == ["12.8k", "0", "1.2", "3", "done"]


@pytest.mark.parametrize(("attack", "state"), [("broken", "3 failed"), ("asks", "3 unsupported")])
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
    for part in ("+4.2 %", "55", "70.0", "80.0", "0.75", "guess (3)"):
        assert part in found
    assert found.rstrip().endswith("6"), "the duels that did not end well are counted"


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
    low, high = GAIN.split()
    assert low in head and high in head, "intervals are folded, not cut"
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
        "0.8",
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
    assert cells["guess"][column].startswith(f"70.0 {SCORE} (80.0)")
    assert cells["null"][column].startswith("20.0 [13.")  # Wilson: both keys agree
    assert any(
        "0.75 [keys agree], 25% (all: 0%, by p^L 0%), 12 of 55 bits, TPR 25.0 [keys agree]" in line
        for line in lines
    )


def test_markdown_names_the_state_of_what_was_not_measured() -> None:
    assert "2 unsupported" in markdown([record("x", k, None, state="unsupported") for k in (0, 1)])


def test_unreliable_and_diverged_attacks_are_marked() -> None:
    fault = "on the planted weakness 'loud' it got no further than AUC 0.50"
    marked = [*RECORDS, record("blind", 0, 40, unreliable=fault, diverged=True)]
    words = " ".join(shown(marked, width=200).split())
    assert "1 done, 1 diverged, unreliable" in words
    assert f"blind is not reliable: {fault}" in words
    high = f"{100 * wilson(40, 100).high:.1f}"
    assert f"{high}]e* |" in markdown(marked) and "*" not in markdown(RECORDS).replace("**", "")


def test_the_strongest_attack_is_named_with_its_advantage_and_cost() -> None:
    (row,) = [x for x in markdown(RECORDS).splitlines() if x.startswith("| tiny | thief | weak |")]
    assert f"guess (3) | 70.0 {SCORE} (80.0) | 0.50 {GAIN} (0.75) | 12800 samples, 1.2 s |" in row


def test_top5_stands_beside_top1() -> None:
    score = {"value": 0.2, "examples": 100, "further": {"top-5": 0.5}}
    counted = [record("guess", key, None, score=score) for key in (0, 1)]
    assert "| 20.0 [13.3, 28.9]e; top-5 50.0 |" in markdown(counted)


def test_markdown_to_nowhere(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="choose another file"):
        write_markdown(RECORDS, tmp_path / "none" / "x.md")


def test_detection_has_intervals_of_its_own_table() -> None:
    aucs = (0.6, 0.9, 0.75)
    records = [
        record("guess", key, RIGHT[key], detection=DETECTION | {"auc": auc}) for key, auc in enumerate(aucs)
    ]
    found = line(shown(records).partition("detected")[2].partition("strongest")[0], "guess")
    assert "0.75 [0." in found and "25.0 [keys agree]" in found


def test_two_keys_are_said_to_be_too_few() -> None:
    text = " ".join(shown([record("guess", key, RIGHT[key]) for key in (0, 1)]).split())
    assert "70.0 [too few keys]" in text


def test_what_keys_say_of_the_next_one_is_said_in_words() -> None:
    share = f"at most {100 * unseen(3):.0f} % of all keys are worse"
    assert share in " ".join(shown(RECORDS).split()) and share in markdown(RECORDS)
    assert unseen(3) == pytest.approx(0.6316, abs=1e-4)


def test_the_best_defense_and_its_ties_are_marked() -> None:
    others = [
        record("guess", key, right, defense=name)
        for name, rates in {"same": (61, 79, 71), "worse": (79, 98, 89)}.items()
        for key, right in zip(KEYS, rates, strict=True)
    ]
    records = [*RECORDS[:12], *others]
    text = markdown(records)
    assert "| weak (best) |" in text and "| same (≈ best) |" in text and "| worse |" in text
    assert "weak (best)" in shown(records, width=200)


def test_secrets_stand_beside_memory() -> None:
    kept = [r.model_copy(update={"secret_bytes": 12_800}) for r in RECORDS]
    assert "| +4.2 % | 12.8k bytes |" in markdown(kept)
    assert "12.8k" in shown(kept, width=200).partition("strongest attack on each key")[2]
