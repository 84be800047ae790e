"""Comparisons, for people: which defense is better, which attack stronger, and what cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deepenc.arena.estimates.comparison import (
    LEVEL,
    Comparison,
    beside_the_best,
    best_of,
    of_attacks,
    of_defenses,
)
from deepenc.arena.record import Record
from deepenc.report.format import ABSENT, bounds, markdown_table

HEAD = ("more", "less", "difference, points", "keys", "p", "p, Holm", "verdict")

LEGEND = (
    "Difference of the scores in percentage points, paired by key, repeat and example [95 % interval of this "
    "one comparison]. p: Student's t over keys, joined with the error of the examples; Holm: corrected for "
    "all pairs, so that where none differ, any is called apart with a chance of at most "
    f"{LEVEL:.0%}. A tie is no proof that two are equal."
)


@dataclass(frozen=True)
class Shown:
    """A family of comparisons, as far as it is shown.

    Attributes:
        title: What is compared.
        pairs: Number of pairs that the correction is for.
        lines: Those with the best.
    """

    title: str
    pairs: int
    lines: tuple[Comparison, ...]


def families(records: Sequence[Record]) -> Iterator[Shown]:
    """All families of a run, first of defenses and then of attacks; each beside its best."""
    for family in of_defenses(records):
        if family:
            victim, threat = family[0].victim, family[0].threat
            title = f"{victim} against {threat}: defenses, by the strongest attack on each key"
            yield _shown(title, family, best_of(family, higher=False))
    for family in of_attacks(records):
        if family:
            victim, threat, within = family[0].victim, family[0].threat, family[0].within
            yield _shown(
                f"{victim} against {threat}: attacks on {within}", family, best_of(family, higher=True)
            )


def comparisons(records: Sequence[Record]) -> RenderableType:
    """Terminal tables of all comparisons."""
    parts: list[RenderableType] = []
    for shown in families(records):
        table = Table(title=escape(_title(shown)), box=SIMPLE_HEAD, padding=0, pad_edge=False)
        table.title_justify = "left"
        for place, name in enumerate(HEAD):
            table.add_column(name, justify="right" if 1 < place < len(HEAD) - 1 else "left", overflow="fold")
        for line in shown.lines:
            table.add_row(*map(escape, _cells(line)))
        parts.append(table)
    if not parts:
        return Text("There are no two defenses or attacks to compare.")
    return Group(*parts, Text(LEGEND, style="dim"))


def comparisons_markdown(records: Sequence[Record]) -> str:
    """The same as Markdown."""
    parts = [
        f"**{_title(shown)}**\n\n{markdown_table([HEAD, *map(_cells, shown.lines)])}"
        for shown in families(records)
    ]
    return "\n\n".join([*parts, LEGEND]) + "\n" if parts else ""


def _title(shown: Shown) -> str:
    return f"{shown.title} (beside the best; {shown.pairs} {'pair' if shown.pairs == 1 else 'pairs'} in all)"


def _shown(title: str, family: Sequence[Comparison], best: str) -> Shown:
    lines = sorted(beside_the_best(family, best), key=lambda one: one.difference)
    return Shown(title, len(family), tuple(lines))


def _cells(line: Comparison) -> tuple[str, ...]:
    def points(number: float) -> str:
        return f"{100 * number:+.1f}"

    spread = f" {bounds(line.interval, points)}" if line.interval else ""
    p, adjusted = (ABSENT if value is None else f"{value:.2g}" for value in (line.p, line.adjusted))
    difference = points(line.difference) + spread
    return line.first, line.second, difference, str(line.keys), p, adjusted, line.verdict
