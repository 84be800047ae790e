"""What a run says of each defense, in sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from deepenc.arena.estimates.summaries import CellSummary, WorstSummary, summarise, worst
from deepenc.arena.record import Record
from deepenc.report.format import by_frequency, count, estimate, unit
from deepenc.report.frontier import TOLERABLE

BROKEN = 0.5
"""Advantage from which a defense counts as broken: the thief has half of what the original is worth."""


def verdicts(records: Sequence[Record]) -> list[str]:
    """For each victim and defense what it costs, whether it holds, and what the worst attacks get; as text.

    Args:
        records: Of one run, finished or not.
    """
    summaries = summarise(records)
    cells = {summary.group: summary for summary in summaries}
    groups: dict[tuple[str, str], list[WorstSummary]] = defaultdict(list)
    for line in worst(records):
        groups[line.victim, line.defense].append(line)
    said = [
        "\n".join([_head(victim, defense, lines, summaries), *(_line(line, cells) for line in lines)])
        for (victim, defense), lines in groups.items()
    ]
    return said + _unmeasured(records, set(groups))


def _unmeasured(records: Sequence[Record], measured: set[tuple[str, str]]) -> list[str]:
    """The defenses on which no attack was measured, with the reason of the first."""
    reasons: dict[tuple[str, str], str] = {}
    for record in records:
        place = (record.victim, record.defense)
        if record.protected and place not in measured:
            first = (record.reason or "nothing was claimed").strip().partition("\n")[0]
            reasons.setdefault(place, first)
    return [f"{defense} on {victim}: not measured: {why}" for (victim, defense), why in reasons.items()]


def _head(victim: str, defense: str, lines: Sequence[WorstSummary], summaries: Sequence[CellSummary]) -> str:
    own = [s for s in summaries if (s.victim, s.defense) == (victim, defense)]
    memory = next((s.memory for s in own if s.memory is not None), None)
    price = "" if memory is None else f" (+{100 * memory:.1f} % memory)"
    return f"{defense}{price} on {victim}: {_judgement(lines)}."


def _judgement(lines: Sequence[WorstSummary]) -> str:
    gained = [line.advantage.mean for line in lines if line.advantage is not None]
    if not gained:
        return "no advantage can be told, since training from scratch is as good as the original"
    missing = " of those that ended" if any(line.missing for line in lines) else ""
    if max(gained) >= BROKEN:
        return "broken"
    if max(gained) > TOLERABLE:
        return "leaks"
    return f"holds against these attacks{missing}; that is no proof against others"


def _line(line: WorstSummary, cells: dict[tuple[str, str, str, str], CellSummary]) -> str:
    """What the strongest attack of one threat model gets, with what."""
    strongest = by_frequency(line.attacks)[0][0]
    cell = cells[line.victim, line.defense, line.threat, strongest]
    got = f"{cell.measure} {estimate(line.score, 100, 1)[0]} %"
    original = next(
        (
            s.score
            for s in cells.values()
            if (s.victim, s.threat, s.reference) == (line.victim, line.threat, "floor") and not s.protected
        ),
        None,
    )
    of = "" if original is None else f" of the original's {100 * original.mean:.1f} %"
    gain = "" if line.advantage is None else f", advantage {unit(line.advantage)[0]}"
    cost = cell.cost
    spent = "" if cost is None else f"; {count(cost.samples)} samples, {cost.seconds:.1f} s"
    return f"  {line.threat}: {strongest} gets {got}{of}{gain}{spent}."
