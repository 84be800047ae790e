"""One call from a network in memory to a verdict; the same records as any run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import deepenc
from deepenc.arena.record import Record
from deepenc.errors import ConfigError, VictimError
from deepenc.report.verdict import verdicts

THREATS = [{"name": "thief", "labelled": 20, "unlabelled": 40}]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, TensorDataset]:
    """A network that finds the largest of three inputs, and data."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 3, generator=generator)
    network = nn.Sequential(nn.Linear(3, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(network.parameters(), 0.03)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), inputs.argmax(1)).backward()
            optimizer.step()
    fresh = torch.randn(200, 3, generator=generator)
    return network.eval(), TensorDataset(fresh, fresh.argmax(1))


def evaluated(trained: Any, **more: Any) -> deepenc.Report:
    network, data = trained
    given = {"defenses": ["paper-samp"], "attacks": ["null", "recalibrate"], "threats": THREATS, "keys": 2}
    return deepenc.evaluate(network, data, seed=1, **given | more)


def test_a_network_in_memory_gets_its_verdict(trained: Any, tmp_path: Path) -> None:
    before = [tensor.clone() for tensor in trained[0].state_dict().values()]
    report = evaluated(trained, folder=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(before, trained[0].state_dict().values(), strict=True))
    assert {record.state for record in report.duels} == {"done"}
    frame = report.records
    assert len(frame) == len(report.duels) == 8 and set(frame["defense"]) == {"null", "paper-samp"}
    original = frame[(frame.defense == "null") & (frame.attack == "null")]["score_value"]
    assert original.min() > 0.9
    said = str(report)
    assert said.startswith("paper-samp (+") and "on mine: " in said and "thief: " in said
    assert "paper-samp" in report._repr_html_()
    again = evaluated(trained, folder=tmp_path / "run")
    assert [r.provenance for r in again.duels] == [r.provenance for r in report.duels], (
        "nothing was run again"
    )


def test_what_cannot_be_evaluated_is_told_first(trained: Any) -> None:
    network, data = trained
    inputs, labels = data.tensors
    with pytest.raises(VictimError, match=r"targets: .*got 1 to 3"):
        evaluated((network, TensorDataset(inputs, labels + 1)))
    with pytest.raises(VictimError, match="does not run on the defender's examples"):
        evaluated((network, TensorDataset(inputs[:, :2], labels)))
    with pytest.raises(ConfigError, match="did you mean 'paper-samp'"):
        evaluated(trained, defenses=["paper-sampp"])
    with pytest.raises(ConfigError, match="quick"):
        evaluated(trained, attacks="quik")
    with pytest.raises(VictimError, match="the data set is empty"):
        evaluated((network, TensorDataset(inputs[:0], labels[:0])))


def record(attack: str, value: float | None, *, defense: str = "d", key: int = 0, **more: Any) -> Record:
    return Record(
        cell=f"{defense}{attack}{key}", victim="v", defense=defense, attack=attack, threat="t", key=key,
        repeat=0,
        protected=defense != "null", state="done" if value is not None else "failed",
        score=None if value is None else {"value": value, "examples": 100}, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("best", "word"), [(0.88, "broken"), (0.6, "leaks"), (0.51, "holds against these")])
def test_the_word_follows_the_worst_advantage(best: float, word: str) -> None:
    """Between 0.5 from scratch and 0.9 for the original."""
    references = [
        record("null", 0.9, defense="null", reference="floor"),
        record("own", 0.5, defense="null", reference="scratch"),
    ]
    (said,) = verdicts([*references, record("null", 0.1, reference="floor"), record("x", best)])
    assert f"d on v: {word}" in said and f"x gets accuracy {100 * best:.1f}" in said
    assert "of the original's 90.0 %" in said


def test_a_defense_on_which_nothing_was_measured_is_told() -> None:
    (said,) = verdicts([record("x", None, reason="budget too small\nTraceback")])
    assert said == "d on v: not measured: budget too small"
