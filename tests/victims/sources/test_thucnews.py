"""The classifier of titles: texts as rows of characters, parts apart, trained once for each set of titles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from deepenc.arena.duel import judged
from deepenc.errors import VictimError
from deepenc.victims.data.cache import cache_folder
from deepenc.victims.data.texts import Text, encoded, read_texts, vocabulary
from deepenc.victims.recipe import Recipe
from deepenc.victims.sources import thucnews
from deepenc.victims.sources.thucnews import Thucnews
from deepenc.victims.validation import validated

NAMES = ["finance", "realty", "stocks", "education", "science", "society", "politics"]
NAMES += ["sports", "game", "entertainment"]


@pytest.mark.long
@pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="DEEPENC_DATA names no data folder")
def test_it_is_right_about_three_titles_in_four() -> None:
    victim = validated(Thucnews().load(cache_folder()))
    score = judged(victim.model, victim, "victim", None, torch.device("cpu"))
    assert score.value > 0.75 and score.further["macro F1"] > 0.75
    assert {f"F1 of {name}" for name in NAMES} < set(score.further)


def test_texts_by_hand() -> None:
    texts = [Text("aab", 1), Text("bca", 0)]
    ids = vocabulary(texts, 5)
    assert ids == {"a": 3, "b": 4}  # the first by frequency, then by code point; c has no place
    rows = encoded([*texts, Text("abcab", 0)], ids, 4)
    assert rows.inputs["input_ids"].tolist() == [[2, 3, 3, 4], [2, 4, 1, 3], [2, 3, 4, 1]]
    assert encoded([Text("a", 0)], ids, 4).inputs["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert rows.targets.tolist() == [1, 0, 0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(thucnews, "RECIPE", Recipe(optimizer="adamw", steps=2, lr=1e-3))
    data = tmp_path / "THUCNews" / "data"
    data.mkdir(parents=True)
    (data / "class.txt").write_text("\n".join(NAMES))
    for part, first in (("dev", "x"), ("test", "y")):
        lines = [f"{first}{'ab' * i} title\t{i % 10}" for i in range(12)]
        (data / f"{part}.txt").write_text("\n".join([*lines, "seen by both\t3", ""]))
    return tmp_path


def test_parts_share_no_title_and_the_network_is_trained_once(folder: Path, monkeypatch: Any) -> None:
    cache = folder / "cache"
    victim = validated(Thucnews(folder=folder).load(cache))
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [13, 4, 8]
    assert victim.task.class_names == tuple(NAMES)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(thucnews, "fit", None)  # would be missed
    network, example = Thucnews(folder=folder / "THUCNews" / "data").network(cache)
    assert all(torch.equal(t, victim.model.state_dict()[n]) for n, t in network.state_dict().items())
    with torch.no_grad():
        assert network(**example).logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("line", "number"), [("no class", 14), ("title\t10", 14), ("\t3", 14), ("title\t-1", 14)]
)
def test_a_line_that_is_no_title_is_named(folder: Path, line: str, number: int) -> None:
    path = folder / "THUCNews" / "data" / "test.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(VictimError, match=f"test.txt, line {number}: expected a text, a tab and a class"):
        read_texts(path, 10)


def test_what_a_folder_must_not_be(folder: Path) -> None:
    data = folder / "THUCNews" / "data"
    (data / "test.txt").write_text("seen by both\t3\n")
    with pytest.raises(VictimError, match="got 13 to train and 0 others to test"):
        Thucnews(folder=folder).load(folder / "cache")
    (data / "test.txt").write_bytes(b"\xff\xfe\t3\n")
    with pytest.raises(VictimError, match="give a text file in UTF-8"):
        Thucnews(folder=folder).load(folder / "cache")
    (data / "class.txt").write_text("one two")
    with pytest.raises(VictimError, match="expected 10 names of classes, got 2"):
        Thucnews(folder=folder).load(folder / "cache")
