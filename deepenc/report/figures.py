"""Pictures of a run: heat maps of attack against defense, and curves over a budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepenc.arena.estimates.summaries import CellSummary, summarise
from deepenc.arena.record import Record
from deepenc.errors import StoreError
from deepenc.report.curves import Chart, apart, charts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figures(records: Sequence[Record], folder: str | Path) -> list[Path]:
    """Draw everything that a run has to show.

    Args:
        records: Of one run.
        folder: For the PNG files; made where missing.

    Returns:
        The files: a heat map for each victim and threat model, a chart for each curve.

    Raises:
        StoreError: They cannot be written.
    """
    summaries = summarise(records)
    folder = Path(folder)
    made = []
    for victim, threat in dict.fromkeys((s.victim, s.threat) for s in apart(summaries)):
        members = [s for s in summaries if (s.victim, s.threat) == (victim, threat) and s.score]
        if members:
            made.append((f"{victim} {threat}", heat_map(members, f"{victim} against {threat}")))
    for chart in charts(summaries):
        made.append((f"{chart.victim} {chart.threat} {chart.budget}", curve(chart)))
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in made:
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.png"
            figure.savefig(path, dpi=150)
            paths.append(path)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return paths


def heat_map(summaries: Sequence[CellSummary], title: str) -> Figure:
    """Accuracy that each attack got out of each defense, in % of the judge's images.

    The strongest attack on a defense has a frame; an attack that failed its self-test an asterisk.

    Args:
        summaries: Of one victim and threat model, with accuracies.
        title: Above the map.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    attacks = list(dict.fromkeys(s.attack for s in summaries))
    defenses = list(dict.fromkeys(s.defense for s in summaries))
    values = np.full((len(attacks), len(defenses)), np.nan)
    figure = Figure(figsize=(2.8 + 0.95 * len(defenses), 1.6 + 0.27 * len(attacks)), layout="constrained")
    axes = figure.subplots()
    for s in summaries:
        assert s.score is not None
        row, column = attacks.index(s.attack), defenses.index(s.defense)
        values[row, column] = 100 * s.score.mean
        text = f"{values[row, column]:.1f}" + ("*" if s.unreliable else "")
        dark = 35 < values[row, column] < 80
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="black" if dark else "white")
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn_r", aspect="auto")
    for column, defense in enumerate(defenses):
        stolen = [s for s in summaries if s.defense == defense and s.protected and s.reference != "scratch"]
        if stolen:
            best = max(stolen, key=lambda s: s.score.mean if s.score else 0.0)
            place = (column - 0.5, attacks.index(best.attack) - 0.5)
            axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=1.6))
    axes.set_xticks(range(len(defenses)), defenses, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(attacks)), attacks, fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="accuracy, %", fraction=0.05)
    return figure


def curve(chart: Chart) -> Figure:
    """Accuracy over a budget, one line for each attack on each defense, with the intervals of the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for line in chart.lines:
        _draw(axes, line.points, f"{line.attack} on {line.defense}")
    if min(chart.values) >= 0 and max(chart.values) > 20:
        axes.set_xscale("symlog", linthresh=max(1.0, min(v for v in chart.values if v > 0)))
        axes.set_xticks(chart.values, [f"{v:g}" for v in chart.values])
        axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel(chart.budget.replace("_", " "))
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{chart.victim} against {chart.threat}", fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def _draw(axes: Axes, points: object, label: str) -> None:
    assert isinstance(points, dict)
    found = [(value, s.score, s.reference) for value, s in points.items() if s.score]
    if not found:
        return
    at = [value for value, _, _ in found]
    means = [100 * estimate.mean for _, estimate, _ in found]
    style = "--" if found[0][2] else "-"
    (drawn,) = axes.plot(at, means, style, marker="o", markersize=3, linewidth=1.2, label=label)
    bounds = [e.interval for _, e, _ in found]
    if all(bounds):
        low, high = [100 * b.low for b in bounds], [100 * b.high for b in bounds]
        axes.fill_between(at, low, high, alpha=0.15, color=drawn.get_color())
