"""mIoU by hand and by torchmetrics, torchvision's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from deepenc.tasks.semantic_segmentation import SemanticSegmentation
from deepenc.tasks.task import Worth


def logits_of(named: Tensor, classes: int) -> Tensor:
    return one_hot(named, classes).movedim(-1, 1).float()


def worth(logits: Tensor, targets: Tensor) -> Worth:
    task = SemanticSegmentation()
    return task.worth(task.outcomes(logits, targets))


def test_miou_by_hand() -> None:
    true = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 0, 0]]])
    named = torch.tensor([[[0, 1, 1, 2]], [[1, 0, 0, 0]]])
    # Class 0: 3 of 5; class 1: 2 of 4; class 2 is named only where nothing counts.
    found = worth(logits_of(named, 3), true)
    assert found.value == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert found.further == {"pixel accuracy": pytest.approx(5 / 7)}


def test_miou_is_torchmetrics_s() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 8, 8, generator=generator)
    true = torch.randint(5, (4, 8, 8), generator=generator)
    true[:, 0] = 255
    reference = MulticlassJaccardIndex(num_classes=6, ignore_index=255)(logits, true)
    assert worth(logits, true).value == pytest.approx(float(reference), rel=1e-6)


def test_a_pixel_without_a_readable_answer_is_of_no_class() -> None:
    true = torch.tensor([[[0, 0, 1, 1]]])
    logits = logits_of(true, 2)
    logits[0, 1, 0, 0] = torch.nan
    found = worth(logits, true)
    assert found.value == pytest.approx((1 / 2 + 1) / 2)
    assert found.further["pixel accuracy"] == pytest.approx(3 / 4)


def test_loss_ignores_and_answers_are_learned_from() -> None:
    task, network = SemanticSegmentation(), nn.Identity()
    true = torch.tensor([[[0, 255]]])
    logits = torch.tensor([[[[0.0, 9.0]], [[0.0, -9.0]]]])
    assert float(task.loss(network, logits, true)) == pytest.approx(0.6931, abs=1e-4)
    answers = task.answers(logits)
    assert torch.allclose(answers.sum(1), torch.ones(1, 1, 2))
    assert float(task.loss(network, logits, answers)) == pytest.approx(0.6931 / 2, abs=1e-3)
    assert task.logits(logits).tolist() == [[0, 0], [9, -9]]


def test_torchvision_s_networks() -> None:
    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    images = torch.zeros(1, 3, 32, 32)
    task = SemanticSegmentation()
    with torch.no_grad():
        outputs = task.run(network, images)
    assert task.complaint(outputs, images) is None and task.fitted(outputs).classes == 3
    assert task.fitted(outputs).head(network) == ("classifier.high_classifier",)
    with_auxiliary = nn.ModuleDict({"classifier": nn.Conv2d(4, 3, 1), "aux_classifier": nn.Conv2d(4, 3, 1)})
    assert task.fitted(outputs).head(with_auxiliary) == ("classifier",)


def test_what_does_not_fit() -> None:
    task = SemanticSegmentation(classes=3)
    fits = torch.tensor([[[0, 2, 255]]])
    assert task.misfit(fits) is None and not task.uninformative(fits)
    assert "below 3, the number of classes, or 255 to ignore, got 0 to 3" in str(
        task.misfit(fits + (fits == 2))
    )
    assert "255 everywhere" in str(task.misfit(torch.full((1, 2, 2), 255)))
    assert "got int64 (3,)" in str(task.misfit(torch.zeros(3, dtype=torch.int64)))
    assert task.uninformative(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert "(1, 3, height, width), got float32 (1, 3)" in str(task.complaint(torch.zeros(1, 3), fits))
