"""A victim whose numbers would mean nothing is refused before anything is measured on it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepenc.arena.run.worker import Workspace
from deepenc.errors import VictimError
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.splits import shared
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim, VictimSource


def images(count: int, seed: int) -> Examples:
    """Random inputs; their class is where the largest of three values is."""
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return Examples(inputs, inputs.argmax(1))


def victim(**changed: Any) -> Victim:
    parts = (images(20, 0), images(30, 1), images(40, 2))
    return replace(Victim("mine", nn.Identity(), Classification(classes=3), *parts, "0" * 64), **changed)


def test_a_victim_that_is_right_is_itself(caplog: pytest.LogCaptureFixture) -> None:
    right = victim(model=nn.Sequential(nn.Dropout(), nn.Identity()).train())
    before = torch.get_rng_state()
    assert validated(right) is right and not right.model.training
    assert not caplog.text and torch.equal(before, torch.get_rng_state())


def spoiled(part: str, at: tuple[int, ...], value: float) -> Examples:
    made = images(40, 2)
    getattr(made, part)[at] = value
    return made


class Wrong(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(x)


OVERLAPPING = Examples(torch.cat([images(30, 1).inputs[7:9], images(38, 2).inputs]), images(40, 2).targets)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "judge is attacker": ({"judge": images(30, 1)}, "30 of the attacker's examples are the judge's, too"),
    "two of the judge's": ({"judge": OVERLAPPING}, "2 of the attacker's examples are the judge's, too"),
    "attacker is defender": ({"attacker": images(20, 0)}, "20 of the defender's examples are the attacker's"),
    "a label too large": ({"judge": spoiled("targets", (5,), 3)}, "judge's targets: .* below 3, .* 0 to 3"),
    "a label below 0": ({"judge": spoiled("targets", (5,), -1)}, "judge's targets: expected classes from 0"),
    "the defender's label": ({"defender": spoiled("targets", (5,), 7)}, "defender's targets: .* got 0 to 7"),
    "the first of them": ({"judge": spoiled("targets", (5,), 3)}, "remove them, first of example 5"),
    "one class": (
        {"judge": Examples(images(40, 2).inputs, torch.ones(40).long())},
        "all of 40 of the judge's examples are of one class",
    ),
    "not told how many": (
        {"task": Classification(), "attacker": spoiled("targets", (39,), 3)},
        "attacker's targets: .* below 3, .* first of example 39",
    ),
    "targets of a kind": ({"judge": Examples(images(9, 2).inputs, torch.ones(9))}, r"got float32 \(9,\)"),
    "NaN": ({"judge": spoiled("inputs", (17, 1), torch.nan)}, "judge's inputs: example 17 has values that"),
    "infinite": ({"attacker": spoiled("inputs", (0, 0), torch.inf)}, "attacker's inputs: example 0 has"),
    "no judge": ({"judge": images(0, 0)}, "judge's part: expected at least one example"),
    "no defender": ({"defender": images(0, 0)}, "defender's part: expected at least one example"),
    "no images": ({"attacker": None}, "attacker's part: expected Examples, got NoneType"),
    "no network": ({"model": None}, "expected a torch.nn.Module as `model`, got NoneType"),
    "no public network": ({"public": "resnet18"}, "expected a torch.nn.Module as `public`, got str"),
    "no task": ({"task": 10}, "expected a Task as `task`, got int"),
    "more classes": ({"task": Classification(classes=4)}, r"expected logits .*, here .* \(1, 4\)"),
    "other outputs": ({"model": Wrong(lambda x: {"logits": x})}, r"got \{logits: float32 \(1, 3\)\}"),
    "does not run": ({"model": nn.Linear(5, 3)}, "does not run on the defender's examples: RuntimeError"),
    "NaN outputs": ({"model": Wrong(lambda x: x / 0)}, "outputs on the defender's examples are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_victim_must_not_be(name: str) -> None:
    changed, message = CASES[name]
    with pytest.raises(VictimError, match=f"victim 'mine'.*{message}"):
        validated(victim(**changed))


def test_something_else_is_no_victim() -> None:
    with pytest.raises(VictimError, match="expected a Victim from the source's `load`, got NoneType"):
        validated(None)


def test_a_network_at_chance_is_told(caplog: pytest.LogCaptureFixture) -> None:
    turned = victim(model=Wrong(lambda x: x.roll(1, 1)))
    with caplog.at_level(logging.WARNING):
        validated(turned)
    assert "right about 0 of 40 of the judge's images, no better than chance" in caplog.text
    caplog.clear()
    validated(replace(turned, trained=False))
    validated(victim(judge=images(2, 2)))  # two images say nothing
    assert not caplog.text


def test_a_network_to_be_trained_may_have_the_images_of_another_task() -> None:
    made = victim(defender=Examples(images(20, 0).inputs, torch.arange(20)), trained=False)
    assert validated(made) is made


def test_inputs_are_compared_bit_for_bit_and_not_by_a_few_values() -> None:
    one = torch.randn(6, 3, 20, 20)
    other = one.clone()
    other[:4, 1, 7, 8] += 1  # not among the values that are looked at first
    assert common(one, other) == 2 == common(other, one)
    assert common(one, one[:, :, :10]) == 0 == common(one, one.double())
    assert common(one[:0], one) == 0 == common(one, one[:0])
    assert common(torch.tensor([1, 2, 2]), torch.tensor([2, 3])) == 2
    assert common((one, one), (one, other)) == 2, "several inputs are compared together"


def common(one: Any, other: Any) -> int:
    return shared(Examples(one), Examples(other))


def test_the_arena_asks(tmp_path: Path) -> None:
    class Careless(VictimSource):
        name = "careless"

        def network(self, cache: Path) -> Any:
            return nn.Identity(), images(1, 0).inputs

        def load(self, cache: Path) -> Victim:
            return victim(judge=images(30, 1))

    with pytest.raises(VictimError, match="30 of the attacker's examples are the judge's"):
        Workspace(tmp_path).victim(Careless())
