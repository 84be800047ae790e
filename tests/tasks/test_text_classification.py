"""Precision, recall and F1 of each class, by hand; classes of texts as transformers' networks name them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from deepenc.tasks.text_classification import TextClassification

TRUE = torch.tensor([0, 0, 0, 1, 1, 2])
NAMED = torch.tensor([0, 0, 1, 1, 2, 2])


class Named(nn.Module):
    """Answers as networks of transformers do, with things beside the logits that are no tensors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=one_hot(input_ids[:, 0], 3).float(), cache=object())


def batch(named: Tensor) -> dict[str, Tensor]:
    mask = torch.tensor([[1, 1, 0]]).repeat(len(named), 1)
    return {"input_ids": named[:, None].repeat(1, 3), "attention_mask": mask}


def test_measures_by_hand() -> None:
    task = TextClassification(class_names=("a", "b", "c"))
    outputs = task.run(Named(), batch(NAMED))
    result = task.worth(task.outcomes(outputs, TRUE))
    assert result.value == pytest.approx(4 / 6)
    by_hand = {"a": (1, 2 / 3, 4 / 5), "b": (1 / 2, 1 / 2, 1 / 2), "c": (1 / 2, 1, 2 / 3)}
    for name, (precision, recall, f1) in by_hand.items():
        assert result.further[f"precision of {name}"] == pytest.approx(precision)
        assert result.further[f"recall of {name}"] == pytest.approx(recall)
        assert result.further[f"F1 of {name}"] == pytest.approx(f1)
    assert result.further["macro F1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)


def test_a_text_without_a_readable_answer_is_of_no_class() -> None:
    task = TextClassification()
    logits = one_hot(TRUE, 3).float()
    logits[0, 2] = torch.nan
    result = task.worth(task.outcomes(logits, TRUE))
    assert result.value == pytest.approx(5 / 6)
    assert result.further["recall of 0"] == pytest.approx(2 / 3) and result.further["precision of 0"] == 1


def test_only_classes_that_occur_are_told_of() -> None:
    task = TextClassification(classes=9)
    further = task.worth(task.outcomes(one_hot(NAMED, 9).float(), TRUE)).further
    assert "F1 of 2" in further and "F1 of 3" not in further


def test_tokens_are_those_that_the_mask_lets_through() -> None:
    task = TextClassification()
    assert task.unit == "tokens" and task.units(batch(TRUE)) == 12
    assert task.units({"input_ids": torch.zeros(2, 5)}) == 10 == task.units(torch.zeros(2, 5))


def test_it_learns_from_answers_and_finds_what_makes_them() -> None:
    task = TextClassification().fitted(torch.zeros(2, 3))
    answers = task.answers(Named()(**batch(TRUE)), temperature=2.0)
    assert torch.allclose(answers, (one_hot(TRUE, 3) / 2).softmax(1))
    assert float(task.loss(Named(), batch(TRUE), TRUE)) == pytest.approx(0.5514, abs=1e-4)
    assert task.head(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.ReLU())) == ("1",)
