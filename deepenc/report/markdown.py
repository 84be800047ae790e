"""Tables of a run as Markdown: defenses down, attacks across."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deepenc.arena.record import Record
from deepenc.arena.stats import CellSummary, summarise
from deepenc.errors import StoreError

Cell = Callable[[CellSummary], str]

LEGEND = (
    "Accuracies in % of the judge's images, mean over keys; in brackets the 95 % interval (bootstrap over "
    "keys; Wilson over images where all keys agree), in parentheses the owner's worst key. Detection: area "
    "under the ROC curve, share of sites found exactly, bits of the key left to try. — was not measured."
)


def markdown(records: Sequence[Record]) -> str:
    """All tables of a run.

    Args:
        records: Of one run.

    Returns:
        For each victim and threat model a table of accuracies and, where scores were claimed, one of
        detection.
    """
    summaries = summarise(records)
    judged = {r.accuracy.images for r in records if r.accuracy}
    keys = max((s.accuracy.keys for s in summaries if s.accuracy), default=0)
    images = f"{min(judged)} judge's images" if judged else "no images"
    parts = [f"{LEGEND} Up to {keys} keys, {images}."]
    for victim, threat in dict.fromkeys((s.victim, s.threat) for s in summaries):
        members = [s for s in summaries if (s.victim, s.threat) == (victim, threat)]
        parts.append(f"**{victim}, accuracy under `{threat}`**\n\n{_pivot(members, _accuracy)}")
        scored = [s for s in members if s.detection]
        if scored:
            parts.append(f"**{victim}, detection under `{threat}`**\n\n{_pivot(scored, _detection)}")
    return "\n\n".join(parts) + "\n"


def write_markdown(records: Sequence[Record], path: str | Path) -> None:
    """Write all tables of a run to a file.

    Raises:
        StoreError: The file cannot be written.
    """
    try:
        Path(path).write_text(markdown(records), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _pivot(summaries: Iterable[CellSummary], cell: Cell) -> str:
    found = {(s.defense, s.attack): s for s in summaries}
    attacks = list(dict.fromkeys(attack for _, attack in found))
    rows = [["defense", "memory", *attacks]]
    for defense in dict.fromkeys(defense for defense, _ in found):
        line = [found.get((defense, attack)) for attack in attacks]
        memory = next((s.memory for s in line if s and s.memory is not None), None)
        price = "—" if memory is None else f"+{100 * memory:.1f} %"
        rows.append([defense, price, *(cell(s) if s else "" for s in line)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _accuracy(summary: CellSummary) -> str:
    estimate = summary.accuracy
    if estimate is None:
        return ", ".join(f"{count} {state}" for state, count in summary.states.items())
    text = f"{100 * estimate.mean:.1f}"
    if interval := estimate.interval:
        text += f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return text if estimate.least == estimate.most else f"{text} ({100 * estimate.most:.1f})"


def _detection(summary: CellSummary) -> str:
    found = summary.detection
    if found is None:
        return "—"
    return (
        f"{found.auc.mean:.2f}, {found.exact.mean:.0%}, {found.bits_left.mean:.0f} of {found.bits:.0f} bits"
    )
