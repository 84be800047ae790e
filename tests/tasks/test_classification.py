"""Classification and several labels an example, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, precision_score, recall_score, top_k_accuracy_score
from torch import Tensor, nn

from deepenc.errors import ConfigError
from deepenc.tasks.classification import Classification, MultiLabel
from deepenc.tasks.task import Task


class Answer(nn.Module):
    """Answers as it is told, in order."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, index: Tensor) -> Tensor:
        return self.outputs[index]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(60, 12, generator=torch.Generator().manual_seed(0))


def test_worth_and_loss_against_scikit_learn(logits: Tensor) -> None:
    task, labels = (
        Classification(classes=12),
        torch.randint(12, (60,), generator=torch.Generator().manual_seed(1)),
    )
    worth = task.worth(task.outcomes(logits, labels))
    assert worth.value == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    fifth = top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(12))
    assert worth.further == {"top-5": pytest.approx(fifth)}
    every = torch.arange(60)
    expected = log_loss(labels, logits.double().softmax(1).numpy(), labels=range(12))
    assert float(task.loss(Answer(logits), every, labels)) == pytest.approx(expected, rel=1e-5)
    divided = log_loss(labels, (logits / 3).double().softmax(1).numpy(), labels=range(12))
    assert float(task.loss(Answer(logits), every, labels, temperature=3)) == pytest.approx(divided, rel=1e-5)


def test_answers_are_probabilities_that_can_be_learned_from(logits: Tensor) -> None:
    task = Classification(classes=12)
    soft = task.answers(logits, temperature=2)
    assert torch.allclose(soft, (logits / 2).softmax(1)) and soft.shape == (60, 12)
    entropy = -(soft * soft.log()).sum(1).mean()
    loss = task.loss(Answer(logits), torch.arange(60), soft, temperature=2)
    assert float(loss) == pytest.approx(float(entropy), rel=1e-5), "a model agrees best with itself"


def test_the_number_of_classes_is_read_off_the_outputs(logits: Tensor) -> None:
    assert Classification().fitted(logits).classes == 12
    assert Classification(classes=3).fitted(logits).classes == 3
    assert "here floating point (60, 3), got float32 (60, 12)" in str(
        Classification(classes=3).complaint(logits, torch.zeros(60, 1))
    )
    assert Classification(classes=12).complaint(logits, torch.zeros(60, 1)) is None


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 3]), "below 3, the number of classes, got 0 to 3"),
        (torch.tensor([-1, 0]), "classes from 0"),
        (torch.tensor([0.0, 1.0]), "int64, got float32"),
        (torch.tensor([[0], [1]]), r"got int64 \(2, 1\)"),
        (None, "got NoneType"),
    ],
)
def test_targets_that_are_no_classes(targets: Tensor | None, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(Classification(classes=3).misfit(targets))


def test_the_head_is_the_last_layer_with_an_output_for_each_class() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 7))
    assert Classification(classes=3).head(network) == ("2",)
    assert Classification(classes=9).head(network) == ()


def test_several_labels_against_scikit_learn(logits: Tensor) -> None:
    task = MultiLabel(classes=12)
    truth = (torch.rand(60, 12, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    worth = task.worth(task.outcomes(logits, truth))
    named = (logits > 0).numpy()
    expected = [f(truth.numpy(), named, average="micro") for f in (f1_score, precision_score, recall_score)]
    assert [worth.value, worth.further["precision"], worth.further["recall"]] == pytest.approx(expected)
    assert task.misfit(truth) is None
    assert "0 or 1" in str(task.misfit(truth + 1)) and "12 classes" in str(task.misfit(truth[:, :3]))
    silent = torch.full((2, 12), torch.nan)
    assert np.array_equal(task.outcomes(silent, truth[:2])[0][:2], [0, 0]), "NaN names no class"


def test_what_a_task_does_not_offer_is_said() -> None:
    for ask in ("logits", "labels"):
        with pytest.raises(ConfigError, match="'multi-label' has no"):
            getattr(MultiLabel(), ask)(torch.zeros(1))


def test_tasks_are_plugins() -> None:
    assert Task.build("classification") == Classification()
    assert Task.build({"name": "multi-label", "classes": 3}) == MultiLabel(classes=3)
