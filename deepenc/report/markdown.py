"""Tables of a run as Markdown: attacks down, defenses across."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deepenc.arena.estimates.comparison import ties
from deepenc.arena.estimates.estimate import Estimate
from deepenc.arena.estimates.summaries import CellSummary, summarise, worst
from deepenc.arena.record import Record
from deepenc.errors import StoreError
from deepenc.report.comparison import comparisons_markdown
from deepenc.report.curves import Chart, apart, charts
from deepenc.report.format import (
    ABSENT,
    BEST,
    INTERVAL,
    TIES,
    by_frequency,
    count,
    estimate,
    markdown_table,
    owners,
    share,
    states,
    with_keys,
)
from deepenc.report.frontier import TOLERABLE, Frontier, frontiers

Cell = Callable[[CellSummary], str]

LEGEND = (
    f"Scores in %. {INTERVAL} (the owner's worst key). Detection: area under the "
    "ROC curve, share of sites found exactly (share of keys with all sites found, and what the paper's p^L "
    "makes it), bits of the key left to try, true positive rate at 1 % false positives in %. "
    f"{TIES} {ABSENT} was not measured."
)


def markdown(records: Sequence[Record]) -> str:
    """All tables of a run.

    Args:
        records: Of one run.

    Returns:
        The strongest attack on every defense; for each victim and threat model a table of accuracies and,
        where scores were claimed, one of detection; a table for each curve, and how far each defense holds.
    """
    summaries = summarise(records)
    judged = {r.score.examples for r in records if r.score}
    keys = max((s.score.keys for s in summaries if s.score), default=0)
    images = f"{min(judged)} judge's examples" if judged else "no examples"
    parts = [f"{LEGEND} Up to {keys} keys, {images}."]
    if strongest := _strongest(records, summaries):
        parts.append(f"**The strongest attack on each key**\n\n{strongest}")
    plain = apart(summaries)
    for victim, threat in dict.fromkeys((s.victim, s.threat) for s in plain):
        members = [s for s in plain if (s.victim, s.threat) == (victim, threat)]
        parts.append(f"**{victim}, {members[0].measure} under `{threat}`**\n\n{_pivot(members, _score)}")
        scored = [s for s in members if s.detection]
        if scored:
            parts.append(f"**{victim}, detection under `{threat}`**\n\n{_pivot(scored, _detection)}")
    parts += [_chart(chart) for chart in charts(summaries)]
    if found := frontiers(records):
        parts.append(_frontiers(found))
    return "\n\n".join(parts) + "\n"


def write_markdown(records: Sequence[Record], path: str | Path, *, compare: bool = False) -> None:
    """Write all tables of a run to a file.

    Args:
        records: Of one run.
        path: The file.
        compare: Whether the comparisons follow.

    Raises:
        StoreError: The file cannot be written.
    """
    try:
        text = markdown(records) + ("\n" + comparisons_markdown(records) if compare else "")
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _strongest(records: Sequence[Record], summaries: Iterable[CellSummary]) -> str:
    found = {s.group: s for s in summaries}
    rows = [
        [
            *("victim", "threat", "defense", "memory", "secret", "strongest attack (keys)"),
            *("score", "advantage", "its cost"),
        ]
    ]
    lines, marks = worst(records), ties(records)
    for line in lines:
        strongest = by_frequency(line.attacks)[0][0]
        cell = found[line.victim, line.defense, line.threat, strongest]
        rows.append(
            [
                line.victim,
                line.threat,
                line.defense + BEST.get(marks.get((line.victim, line.defense, line.threat), ""), ""),
                ABSENT if cell.memory is None else f"+{100 * cell.memory:.1f} %",
                ABSENT if cell.secret_bytes is None else f"{count(cell.secret_bytes)} bytes",
                with_keys(line.attacks),
                _estimate(line.score, 100, 1),
                _estimate(line.advantage, 1, 2),
                _cost(cell),
            ]
        )
    said = "\n\n" + " ".join(owners(line.score.keys for line in lines))
    return markdown_table(rows) + said if len(rows) > 1 else ""


def _cost(summary: CellSummary) -> str:
    cost = summary.cost
    if cost is None:
        return ABSENT
    spent = [
        (cost.samples, "samples"),
        (cost.steps, "steps"),
        (cost.queries, "queries"),
        (cost.trials, "trials"),
    ]
    return ", ".join([*(f"{count:.0f} {what}" for count, what in spent if count), f"{cost.seconds:.1f} s"])


def _pivot(summaries: Iterable[CellSummary], cell: Cell) -> str:
    found = {(s.attack, s.defense): s for s in summaries}
    defenses = list(dict.fromkeys(defense for _, defense in found))
    prices = {
        d: next((s.memory for s in found.values() if s.defense == d and s.memory), None) for d in defenses
    }
    heads = [d if prices[d] is None else f"{d} (+{100 * (prices[d] or 0):.1f} %)" for d in defenses]
    rows = [["attack", *heads]]
    for attack in dict.fromkeys(attack for attack, _ in found):
        line = [found.get((attack, defense)) for defense in defenses]
        rows.append([attack, *(cell(s) if s else "" for s in line)])
    return markdown_table(rows)


def _chart(chart: Chart) -> str:
    budget = chart.budget.replace("_", " ")
    rows = [["attack", "defense", *(f"{budget} {value:g}" for value in chart.values)]]
    for line in chart.lines:
        cells = [line.points.get(value) for value in chart.values]
        name = f"{line.attack} (falls)" if line.falls else line.attack
        rows.append([name, line.defense, *(_score(s) if s else "" for s in cells)])
    return f"**{chart.victim}, accuracy over {budget} under `{chart.threat}`**\n\n{markdown_table(rows)}"


def _frontiers(found: Sequence[Frontier]) -> str:
    parts = []
    for victim, threat, budget in dict.fromkeys((f.victim, f.threat, f.budget) for f in found):
        lines = [f for f in found if (f.victim, f.threat, f.budget) == (victim, threat, budget)]
        values = sorted({value for line in lines for value in line.points})
        name = budget.replace("_", " ")
        rows = [["defense", *(f"{name} {value:g}" for value in values), "holds up to"]]
        for line in lines:
            points = [line.points.get(value) for value in values]
            gained = [
                "" if p is None or p.advantage is None else _estimate(p.advantage, 1, 2) for p in points
            ]
            rows.append([line.defense, *gained, ABSENT if line.holds is None else f"{line.holds:g}"])
        parts.append(
            f"**{victim}, advantage of the strongest attack over {name} under `{threat}`; a defense holds "
            f"while its mean is at most {TOLERABLE:g}**\n\n{markdown_table(rows)}"
        )
    return "\n\n".join(parts)


def _score(summary: CellSummary) -> str:
    if summary.score is None:
        return states(summary.states)
    mark = "*" if summary.unreliable else ""
    further = "".join(f"; {name} {share(value.mean)}" for name, value in summary.further.items())
    return _estimate(summary.score, 100, 1) + mark + further


def _estimate(value: Estimate | None, factor: int, digits: int) -> str:
    """The mean, its interval, and in parentheses the owner's worst key where keys differ."""
    text, most = estimate(value, factor, digits)
    return text if value is None or value.least == value.most else f"{text} ({most})"


def _detection(summary: CellSummary) -> str:
    found = summary.detection
    if found is None:
        return ABSENT
    layers = found.layers
    together = f" (all: {layers.joint:.0%}, by p^L {layers.product:.0%})" if found.exact.mean else ""
    return (
        f"{estimate(found.auc, 1, 2)[0]}, {found.exact.mean:.0%}{together}, "
        f"{found.bits_left.mean:.0f} of {found.bits:.0f} bits, TPR {estimate(found.tpr, 100, 1)[0]}"
    )
