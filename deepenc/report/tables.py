"""Terminal tables of a run: who got how far against what, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deepenc.arena.estimates.comparison import ties
from deepenc.arena.estimates.summaries import CellSummary, Place, WorstSummary, summarise, worst
from deepenc.arena.record import Record
from deepenc.report.format import (
    ABSENT,
    BEST,
    INTERVAL,
    TIES,
    count,
    estimate,
    owners,
    percent,
    states,
    unit,
    with_keys,
)

LEGEND = (
    f"{INTERVAL}; `top` is the key on which the attack did best, the owner's worst. "
    "Advantage: 0 is no more than training from scratch, 1 the stolen original. "
    "AUC, TPR at 1 % false positives, share of sites found exactly, and bits of the key left to try: "
    "how well confusion channels were detected (chance: AUC 0.5, TPR 0.01). "
    "Images, steps, s: mean cost of a duel. "
    f"{TIES} "
    f"{ABSENT} was not measured: the state says why."
)


def report(records: Sequence[Record]) -> RenderableType:
    """All tables of a run: the strongest attack per defense, then every cell, then the legend."""
    if not records:
        return Text("No duel has been run yet.")
    summaries = summarise(records)
    parts: list[RenderableType] = []
    for (victim, threat), members in _by(summaries):
        parts += [cells(victim, threat, members), *_reasons(members)]
        if scored := [line for line in members if line.detection]:
            parts.append(detections(victim, threat, scored))
    strongest, marks = worst(records), ties(records)
    for victim in dict.fromkeys(line.victim for line in strongest):
        lines = [w for w in strongest if w.victim == victim]
        parts.append(overview(victim, lines, summaries, marks))
        parts += [Text(f"  {said}") for said in owners(line.score.keys for line in lines)]
    return Group(*parts, Text(LEGEND, style="dim"))


def overview(
    victim: str,
    strongest: Sequence[WorstSummary],
    summaries: Sequence[CellSummary],
    marks: Mapping[Place, str],
) -> Table:
    """One line per threat and defense of a victim: its price, and its strongest attack.

    Args:
        victim: For the title.
        strongest: From `worst`, of that victim.
        summaries: From `summarise`, for memory, secret and key bits.
        marks: From `ties`.
    """
    price = {(s.victim, s.defense): s for s in summaries if s.memory is not None}
    table = _table(f"{victim}: every defense against the strongest attack on each key")
    for name in ("threat", "defense"):
        table.add_column(name, no_wrap=True)
    for name in ("memory", "secret B", "key bits", "score %", "top", "advantage", "top"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("strongest attack (keys)", overflow="fold")
    table.add_column("not done", justify="right", overflow="fold")
    for line in strongest:
        cost = price.get((line.victim, line.defense))
        memory, secret, bits = (cost.memory, cost.secret_bytes, cost.key_bits) if cost else (None,) * 3
        table.add_row(
            escape(line.threat),
            escape(line.defense) + BEST.get(marks.get((line.victim, line.defense, line.threat), ""), ""),
            ABSENT if memory is None else f"+{100 * memory:.1f} %",
            ABSENT if secret is None else count(secret),
            ABSENT if bits is None else f"{bits:.0f}",
            *map(escape, (*percent(line.score), *unit(line.advantage))),
            escape(with_keys(line.attacks)),
            str(line.missing) if line.missing else "",
        )
    return table


def cells(victim: str, threat: str, summaries: Iterable[CellSummary]) -> Table:
    """Every attack on every defense of one victim under one threat model.

    Args:
        victim: For the title.
        threat: For the title.
        summaries: Of that victim and threat.
    """
    table = _table(f"{victim} against {threat}")
    table.add_column("attack", no_wrap=True)
    for name in ("score %", "top", "advantage", "AUC", "TPR", "exact", "bits"):
        table.add_column(name, justify="right", overflow="fold", min_width=len(name))
    for name in ("images", "steps", "s"):
        table.add_column(name, justify="right", style="dim", overflow="fold")
    table.add_column("state", overflow="fold")
    for defense, lines in groupby(summaries, key=lambda s: s.defense):
        table.add_section()
        table.add_row(escape(defense), style="bold")
        for line in lines:
            table.add_row(*_cell(line), style="dim" if line.reference else "")
    return table


def detections(victim: str, threat: str, summaries: Iterable[CellSummary]) -> Table:
    """What claimed scores are worth, with intervals.

    Args:
        victim: For the title.
        threat: For the title.
        summaries: Of that victim and threat, with scores.
    """
    table = _table(f"{victim} against {threat}: confusion channels detected")
    table.add_column("attack", no_wrap=True)
    table.add_column("defense", no_wrap=True)
    for name in ("AUC", "TPR % at 1 % FPR", "sites exact %", "bits left"):
        table.add_column(name, justify="right", overflow="fold")
    for line in summaries:
        found = line.detection
        assert found is not None
        measured = (
            unit(found.auc),
            percent(found.tpr),
            percent(found.exact),
            estimate(found.bits_left, 1, 0),
        )
        table.add_row(escape(line.attack), escape(line.defense), *(escape(text) for text, _ in measured))
    return table


def _table(title: str) -> Table:
    """A table whose columns fold where the terminal is narrow, so that none is dropped or cut."""
    table = Table(title=escape(title), box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.title_justify = "left"
    return table


def _cell(line: CellSummary) -> list[str]:
    found, cost = line.detection, line.cost
    detection = (
        (
            f"{found.auc.mean:.2f}",
            f"{found.tpr.mean:.2f}",
            f"{found.exact.mean:.0%}",
            f"{found.bits_left.mean:.0f}",
        )
        if found
        else (ABSENT,) * 4
    )
    spent = (count(cost.samples), count(cost.steps), f"{cost.seconds:.1f}") if cost else (ABSENT,) * 3
    score, top = percent(line.score)
    return [
        f" {escape(_name(line))}",
        escape(score),
        top,
        escape(unit(line.advantage)[0]),
        *detection,
        *spent,
        _state(line),
    ]


def _name(line: CellSummary) -> str:
    if line.reference == "floor":
        return f"{line.attack} (as is)" if line.protected else f"{line.attack} (original)"
    return line.attack


def _state(line: CellSummary) -> str:
    said = [states(line.states)]
    if line.diverged:
        said.append(f"{line.diverged} diverged")
    if line.unreliable:
        said.append("unreliable")
    return ", ".join(said)


def _reasons(summaries: Iterable[CellSummary]) -> list[RenderableType]:
    """Why duels did not end "done", each reason once, by its first line."""
    found: dict[str, dict[str, None]] = {}
    for line in summaries:
        if line.reason is not None:
            first = (line.reason.strip() or "no reason was kept").splitlines()[0]
            found.setdefault(f": {first}", {})[line.attack] = None
        if line.unreliable:
            found.setdefault(f" is not reliable: {line.unreliable}", {})[line.attack] = None
    return [Text(f"  {_few(list(attacks))}{text}", style="yellow") for text, attacks in found.items()]


def _few(attacks: Sequence[str]) -> str:
    """Names, the first three of many.

    >>> _few(["a"]), _few(["a", "b", "c", "d", "e"])
    ('a', 'a, b, c and 2 others')
    """
    return ", ".join(attacks[:3]) + (f" and {len(attacks) - 3} others" if len(attacks) > 3 else "")


def _by(summaries: Sequence[CellSummary]) -> list[tuple[tuple[str, str], list[CellSummary]]]:
    groups: dict[tuple[str, str], list[CellSummary]] = {}
    for line in summaries:
        groups.setdefault((line.victim, line.threat), []).append(line)
    return list(groups.items())
