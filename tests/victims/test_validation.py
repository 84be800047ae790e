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
from deepenc.victims.data.splits import shared
from deepenc.victims.validation import validated
from deepenc.victims.victim import Images, Victim, VictimSource


def images(count: int, seed: int) -> Images:
    """Random inputs; their class is where the largest of three values is."""
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return Images(inputs, inputs.argmax(1))


def victim(**changed: Any) -> Victim:
    made = Victim("mine", nn.Identity(), 3, images(20, 0), images(30, 1), images(40, 2), "0" * 64)
    return replace(made, **changed)


def test_a_victim_that_is_right_is_itself(caplog: pytest.LogCaptureFixture) -> None:
    right = victim(model=nn.Sequential(nn.Dropout(), nn.Identity()).train())
    before = torch.get_rng_state()
    assert validated(right) is right and not right.model.training
    assert not caplog.text and torch.equal(before, torch.get_rng_state())


def spoiled(part: str, at: tuple[int, ...], value: float) -> Images:
    made = images(40, 2)
    getattr(made, part)[at] = value
    return made


class Wrong(nn.Module):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(x)


OVERLAPPING = Images(torch.cat([images(30, 1).inputs[7:9], images(38, 2).inputs]), images(40, 2).labels)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "judge is attacker": ({"judge": images(30, 1)}, "30 of the attacker's images are the judge's, too"),
    "two of the judge's": ({"judge": OVERLAPPING}, "2 of the attacker's images are the judge's, too"),
    "attacker is defender": ({"attacker": images(20, 0)}, "20 of the defender's images are the attacker's"),
    "a label too large": ({"judge": spoiled("labels", (5,), 3)}, "judge's labels: .* below 3, .* got 0 to 3"),
    "a label below 0": ({"judge": spoiled("labels", (5,), -1)}, "judge's labels: expected classes from 0"),
    "the defender's label": ({"defender": spoiled("labels", (5,), 7)}, "defender's labels: .* got 0 to 7"),
    "fewer labels": ({"judge": Images(images(9, 2).inputs, images(8, 2).labels)}, r"labels: .*int64 \(9,\)"),
    "labels of another kind": ({"judge": Images(images(9, 2).inputs, torch.ones(9))}, "got torch.float32"),
    "NaN": ({"judge": spoiled("inputs", (17, 1), torch.nan)}, "judge's inputs: image 17 has values that"),
    "infinite": ({"attacker": spoiled("inputs", (0, 0), torch.inf)}, "attacker's inputs: image 0 has values"),
    "no judge": ({"judge": images(0, 0)}, "judge's inputs: expected .* at least one image"),
    "no defender": ({"defender": images(0, 0)}, "defender's inputs: expected .* at least one image"),
    "no images": ({"attacker": None}, "attacker's part: expected Images, got NoneType"),
    "no network": ({"model": None}, "expected a torch.nn.Module as `model`, got NoneType"),
    "no public network": ({"public": "resnet18"}, "expected a torch.nn.Module as `public`, got str"),
    "one class": ({"classes": 1}, "expected a number of classes, 2 or more, got 1"),
    "more classes": ({"classes": 4}, r"expected outputs \(images, classes\), here \(1, 4\)"),
    "other outputs": ({"model": Wrong(lambda x: {"logits": x})}, r"got dict"),
    "does not run": ({"model": nn.Linear(5, 3)}, "does not run on the defender's images: RuntimeError"),
    "NaN outputs": ({"model": Wrong(lambda x: x / 0)}, "outputs on the defender's images are not finite"),
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
    made = victim(defender=Images(images(20, 0).inputs, torch.arange(20)), trained=False)
    assert validated(made) is made


def test_inputs_are_compared_bit_for_bit_and_not_by_a_few_values() -> None:
    one = torch.randn(6, 3, 20, 20)
    other = one.clone()
    other[:4, 1, 7, 8] += 1  # not among the values that are looked at first
    assert shared(one, other) == 2 == shared(other, one)
    assert shared(one, one[:, :, :10]) == 0 == shared(one, one.double())
    assert shared(one[:0], one) == 0 == shared(one, one[:0])
    assert shared(torch.tensor([1, 2, 2]), torch.tensor([2, 3])) == 2


def test_the_arena_asks(tmp_path: Path) -> None:
    class Careless(VictimSource):
        name = "careless"

        def network(self, cache: Path) -> Any:
            return nn.Identity(), images(1, 0).inputs

        def load(self, cache: Path) -> Victim:
            return victim(judge=images(30, 1))

    with pytest.raises(VictimError, match="30 of the attacker's images are the judge's"):
        Workspace(tmp_path).victim(Careless())
