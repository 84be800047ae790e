"""Curves: points find their lines, a fall is noticed, pictures show what was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from deepenc.arena.estimates.summaries import summarise
from deepenc.arena.record import Record
from deepenc.arena.threat import Threat
from deepenc.errors import StoreError
from deepenc.report.curves import apart, charts
from deepenc.report.figures import curve, heat_map, write_figures
from deepenc.report.markdown import markdown

THIEF = Threat(name="thief")


def records(rates: dict[float, int], attack: str = "tune", defense: str = "weak") -> list[Record]:
    return [
        Record(
            cell=f"{attack}-{value}-{key}",
            victim="tiny",
            defense=defense,
            attack=attack,
            threat=THIEF.at("labelled", value).name,
            key=key,
            repeat=0,
            protected=True,
            state="done",
            score={"value": (correct + key) / 100, "examples": 100},
        )
        for value, correct in rates.items()
        for key in (0, 1, 2)
    ]


PLAIN = [r.model_copy(update={"threat": "thief", "attack": "norms"}) for r in records({0: 40})]


def test_points_are_gathered_in_ascending_order():
    (chart,) = charts(summarise([*records({500: 80, 50: 60, 0: 10}), *PLAIN]))
    assert (chart.victim, chart.threat, chart.budget, chart.values) == (
        "tiny",
        "thief",
        "labelled",
        (0, 50, 500),
    )
    (line,) = chart.lines
    assert [round(100 * s.score.mean) for s in line.points.values()] == [11, 61, 81]


def test_points_are_kept_out_of_the_matrix():
    assert [s.attack for s in apart(summarise([*records({5: 1}), *PLAIN]))] == ["norms"]


@pytest.mark.parametrize(
    ("rates", "falls"), [({1: 20, 5: 60, 9: 61}, False), ({1: 60, 5: 20}, True), ({1: 60, 5: 59}, False)]
)
def test_a_fall_beyond_the_intervals_is_noticed(rates, falls):
    (chart,) = charts(summarise(records(rates)))
    assert chart.lines[0].falls is falls
    assert ("tune (falls)" in markdown(records(rates))) is falls


def test_markdown_has_a_table_for_the_curve():
    text = markdown([*records({0: 10, 50: 60}), *PLAIN])
    assert "**tiny, accuracy over labelled under `thief`**" in text
    assert "| attack | defense | labelled 0 | labelled 50 |" in text
    assert re.search(
        r"\| tune \| weak \| 11.0 \[\S+, \S+\]k \(12.0\) \| 61.0 \[\S+, \S+\]k \(62.0\) \|", text
    )


def test_the_heat_map_frames_the_strongest_and_marks_the_unreliable():
    weak = [r.model_copy(update={"threat": "thief", "unreliable": "blind"}) for r in records({0: 70})]
    figure = heat_map(summarise([*weak, *PLAIN]), "t")
    axes = figure.axes[0]
    assert sorted(t.get_text() for t in axes.texts) == ["41.0", "71.0*"]
    (frame,) = [p for p in axes.patches if not p.get_fill()]
    assert [t.get_text() for t in axes.get_yticklabels()][round(frame.get_y() + 0.5)] == "tune"


def test_the_curve_shows_means_and_intervals():
    (chart,) = charts(summarise(records({0: 10, 50: 60, 500: 80})))
    axes = curve(chart).axes[0]
    (drawn,) = axes.lines
    assert drawn.get_xydata().tolist() == [[0, 11], [50, 61], [500, 81]]
    assert len(axes.collections) == 1


def test_pictures_are_written(tmp_path: Path):
    paths = write_figures([*records({0: 10, 50: 60}), *PLAIN], tmp_path / "new")
    assert [p.name for p in paths] == ["tiny-thief.png", "tiny-thief-labelled.png"]
    assert all(imread(path).shape[0] > 100 for path in paths)


def test_pictures_to_nowhere(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="choose another folder"):
        write_figures(PLAIN, tmp_path / "file" / "folder")
