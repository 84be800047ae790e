from __future__ import annotations

from pathlib import Path

import pytest

from deepenc.config import load
from deepenc.errors import ConfigError
from deepenc.study.search import Search
from deepenc.victims.data.cache import cache_folder

GOOD = """\
name: small
victims: [digits-resnet]
defenses: [null, paper-samp]
attacks:
  - null
  - {name: collisions, label: equal}
threats:
  - {name: thief, labelled: 10}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    message = str(caught.value)
    assert "experiment.yaml" in message
    return message


def test_a_good_file_becomes_an_experiment(tmp_path: Path) -> None:
    experiment = load(write(tmp_path, GOOD))
    assert [d.name for d in experiment.defenses] == ["null", "paper-samp"]
    assert [e.label for e in experiment.attacks] == ["null", "equal"]
    assert experiment.threats[0].labelled == 10
    assert experiment.keys == 3


@pytest.mark.parametrize("name", ["quickstart", "cifar10"])
def test_the_ready_experiments_load(name: str) -> None:
    experiment = load(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    assert experiment.name == name
    assert experiment.keys >= 2, "a number without a second key has no interval"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: small\n", "name: small\nkey: 3\n", ["key (line 2)", "unknown field 'key'", "'keys'"]),
        ("name: small\n", "name: small\nkeys: 0\n", ["keys (line 2)", "greater than or equal to 1", "got 0"]),
        ("name: small\n", "name: small\nkeys: many\n", ["keys (line 2)", "valid integer", "'many'"]),
        ("name: small\n", "", ["name", "missing"]),
        ("name: small", "name: ../up", ["name (line 1)", "pattern", "'../up'"]),
        ("paper-samp", "paper-sampl", ["defenses[1] (line 3)", "'paper-sampl'", "did you mean 'paper-samp'"]),
        ("digits-resnet", "digit-resnet", ["victims[0] (line 2)", "did you mean 'digits-resnet'"]),
        ("collisions", "colisions", ["attacks[1] (line 6)", "did you mean 'collisions'"]),
        ("label: equal", "lable: equal", ["attacks[1] (line 6)", "unknown parameter 'lable'"]),
        ("labelled: 10", "labeled: 10", ["threats[0].labeled (line 8)", "did you mean 'labelled'"]),
        ("labelled: 10", "labelled: -1", ["threats[0].labelled (line 8)", "got -1"]),
        ("labelled: 10", "key_fraction: .nan", ["threats[0].key_fraction (line 8)", "got nan"]),
        ("label: equal", "label: 'null'", ["attacks", "'null'", "listed twice"]),
        ("label: equal", "threats: [spy]", ["spy", "thief"]),
        ("[digits-resnet]", "digits-resnet", ["victims (line 2)", "list", "'digits-resnet'"]),
        ("[digits-resnet]", "[]", ["victims (line 2)", "at least 1 item"]),
        (
            "paper-samp",
            "{name: x, placement: {name: proportional, proportion: -1}, weights: samp}",
            ["defenses[1].placement (line 3)", "proportion: expected", "got -1"],
        ),
        (
            "paper-samp",
            "{name: x, placement: {name: proportional, proportion: .nan}, weights: samp}",
            ["defenses[1].placement (line 3)", "proportion: expected", "got nan"],
        ),
        ("paper-samp", "{name: x, weights: samp}", ["defenses[1] (line 3)", "placement"]),
        ("name: small\n", "name: small\nname: large\n", ["line 2", "'name' is given twice"]),
        ("[null, paper-samp]", "[null, paper-samp", ["not YAML at line", "repair"]),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_place(
    tmp_path: Path, old: str, new: str, said: list[str]
) -> None:
    assert old in GOOD
    message = complaint(tmp_path, GOOD.replace(old, new, 1))
    for part in said:
        assert part in message


def test_a_complaint_about_a_plugin_has_the_line_of_its_parameter(tmp_path: Path) -> None:
    longer = GOOD.replace(
        "  - {name: collisions, label: equal}\n",
        "  - name: chain\n    label: both\n    stages:\n      - influence\n"
        "      - name: finetune\n        lr: -1\n",
    )
    message = complaint(tmp_path, longer)
    assert "attacks[1] (line 11): attack 'chain'" in message and "got -1" in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  weights:", "  wieghts:", ["space.wieghts (line 10)", "did you mean 'weights'"]),
        (
            "hardening.0.quantile",
            "hardening.0.qantile",
            ["space.hardening.0.qantile", "did you mean 'quantile'"],
        ),
        ("trials: 40", "trails: 40", ["trails (line 18)", "did you mean 'trials'"]),
        ("trials: 40", "trials: 0\njudge: none", ["2 things", "trials (line 18)", "judge (line 19)"]),
        ("lr: 0.01", "lr: fast", ["attacks[4] (line 28)", "finetune", "lr: expected", "'fast'"]),
        ("[worst-advantage]", "[memory]", ["objectives (line 16)", "next to nothing"]),
        ("base: paper-samp", "base: paper", ["base (line 6)", "did you mean 'paper-samp'"]),
    ],
)
def test_a_search_is_told_of_as_an_experiment_is(tmp_path: Path, old: str, new: str, said: list[str]) -> None:
    text = (Path(__file__).parents[1] / "configs" / "tune_digits.yaml").read_text(encoding="utf-8")
    path = write(tmp_path, text.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(path, Search)
    for part in said:
        assert part in str(caught.value)
    assert "Value error" not in str(caught.value) and " it:" not in str(caught.value)


def test_a_configuration_of_the_other_command_is_known_as_such(tmp_path: Path) -> None:
    assert "this is for `deepenc tune`" in complaint(tmp_path, "name: x\nspace: {}\nvictim: digits-resnet\n")
    with pytest.raises(ConfigError, match="this is for `deepenc run`"):
        load(write(tmp_path, GOOD), Search)


def test_all_complaints_about_lists_come_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, GOOD.replace("collisions", "colisions").replace("paper-samp", "paper"))
    assert "2 things to repair" in message
    assert "colisions" in message and "'paper'" in message


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list\n", "a: &x [*x]\n", "? [a, b]\n: 1\n"])
def test_other_yaml_is_refused(tmp_path: Path, text: str) -> None:
    complaint(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*No such file"):
        load(tmp_path / "nowhere.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(binary)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPENC_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DEEPENC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "deepenc"
