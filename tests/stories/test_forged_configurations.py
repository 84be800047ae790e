"""Configurations broken at random: each loads, or is refused in words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pydantic import BaseModel

from deepenc.arena.plan import Experiment
from deepenc.config import load
from deepenc.errors import ConfigError
from deepenc.study.search import Search

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """\
name: small
victims: [digits-resnet]
defenses:
  - null
  - {name: own, placement: "max-entropy:budget=5%", weights: samp, hardening: [optimise, {name: withhold}]}
  - {base: paper-init, name: wider, placement: {name: absolute, sites: [layer1.0.conv1], count: 3}}
attacks:
  - norms
  - finetune:lr=0.01,steps=5
  - {name: chain, stages: [influence, {name: recalibrate, images: 9}], label: both, keys: 1}
  - {name: collisions, curve: {over: labelled, values: [1, 2]}, threats: [thief], victims: [digits-resnet]}
threats:
  - {name: thief, labelled: 10, unlabelled: 20, samples: 500}
keys: 2
seed: 5
judge: 40
device: cpu
"""
NASTY = (
    *(
        "",
        "null",
        "~",
        "[]",
        "{}",
        "''",
        "[[]]",
        "{a: b}",
        "{name: [norms]}",
        "{name: 5}",
        "{name: norms, 1: 2}",
    ),
    *(
        "{1: 2, a: 3}",
        "0",
        "-1",
        ".nan",
        ".inf",
        "1e400",
        "9" * 5000,
        "0x" + "f" * 5000,
        "99999999999999999999",
    ),
    *(
        "2024-99-99",
        "2024-01-01",
        "12:30:45",
        "!!int x",
        "!!int ''",
        "!!float x",
        "!!bool x",
        "!!timestamp x",
    ),
    *("!!binary x", "!!set {a}", "!!python/object:os.system x", "!x y", "&a [*a]", "*a", "<<: 1", "? [a]"),
    *(
        "[" * 200,
        "{a: " * 200,
        "- " * 200,
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        '"\\0"',
        "\x07",
        "\ufeff",
        "\t",
        ":",
        "#",
    ),
    *(
        "finetune:lr=" + "[" * 5000,
        "finetune:lr=!!int x",
        "finetune:lr=2024-99-99",
        "finetune:=",
        "finetune:lr",
        ":",
    ),
    *(
        "norms:" + "a" * 9000,
        "%",
        "---",
        "...",
        "|",
        ">",
        "@",
        "`",
        "é",
        "\u2028",
        "true",
        "yes",
        "no",
        "None",
    ),
    *(
        "{low: 1}",
        "{low: 2, high: 1}",
        "{low: .nan, high: .nan}",
        "{choices: [[1]]}",
        "{low: 0, high: 1, log: true}",
    ),
    *(
        "weights.p",
        "hardening.-1.steps",
        "__class__",
        "placement.counts[x]",
        "[samp, [init]]",
        "[samp, samp]",
    ),
)
MODELS: dict[str, type[BaseModel]] = {"run": Experiment, "tune": Search}


def broken(text: str, rng: random.Random) -> str:
    """A text with up to three things wrong."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = text.splitlines(keepends=True) or [""]
        at, line = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:  # the value of a field
                field, _, _ = lines[line].partition(":")
                lines[line] = f"{field}: {rng.choice(NASTY)}\n"
                text = "".join(lines)
            case 1:  # one word
                words = text.split(" ")
                words[rng.randrange(len(words))] = rng.choice(NASTY)
                text = " ".join(words)
            case 2:
                text = text[:at] + rng.choice(NASTY) + text[at:]
            case 3:
                text = text[:at] + text[at + rng.randrange(1, 30) :]
            case 4:
                lines.insert(rng.randrange(len(lines) + 1), lines[line])
                text = "".join(lines)
            case 5:
                text = (
                    text[:at]
                    + chr(rng.choice((0, 9, 27, 34, 38, 42, 58, 91, 123, 133, 0x10FFFF)))
                    + text[at + 1 :]
                )
    return text


def refused(path: Path, texts: dict[str, str], numbers: range) -> int:
    """How many of the broken texts are refused, always in words."""
    count = 0
    for number in numbers:
        rng = random.Random(number)
        kind = rng.choice(sorted(texts))
        text = broken(texts[kind], rng)
        path.write_text(text, encoding="utf-8")
        try:
            load(path, MODELS[kind])
        except ConfigError as error:
            count += 1
            said = str(error)
            assert said.encode() and len(said) < 6000, number
            assert "Value error" not in said and "Assertion" not in said and " it:" not in said, said
    return count


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {"run": SMALL, "tune": (CONFIGS / "tune_digits.yaml").read_text(encoding="utf-8")}


def test_the_texts_load_while_they_are_whole(texts: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    for kind, text in texts.items():
        path.write_text(text, encoding="utf-8")
        load(path, MODELS[kind])


def test_hundreds_of_broken_configurations(texts: dict[str, str], tmp_path: Path) -> None:
    assert refused(tmp_path / "broken.yaml", texts, range(300)) > 200


@pytest.mark.long
def test_thousands_of_broken_configurations(texts: dict[str, str], tmp_path: Path) -> None:
    assert refused(tmp_path / "broken.yaml", texts, range(1000, 7000)) > 4000
