"""R² and the mean squared error, by hand and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn

from deepenc.tasks.regression import Regression
from deepenc.tasks.task import Worth


def worth(found: Tensor, wanted: Tensor) -> Worth:
    task = Regression()
    return task.worth(task.outcomes(found, wanted))


def test_r2_by_hand() -> None:
    # Squared deviations of 1, 2, 3 from their mean: 2; squared errors: 0.5.
    result = worth(torch.tensor([1.0, 2.5, 3.5]), torch.tensor([1.0, 2.0, 3.0]))
    assert result.value == pytest.approx(1 - 0.5 / 2)
    assert result.further == {"MSE": pytest.approx(0.5 / 3)}


def test_r2_of_several_numbers_is_scikit_learn_s() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(50, 3, generator=generator)
    found = wanted + 0.3 * torch.randn(50, 3, generator=generator)
    assert worth(found, wanted).value == pytest.approx(r2_score(wanted.numpy(), found.numpy()))


def test_it_is_cut_to_shares() -> None:
    wanted = torch.tensor([[1.0], [2.0], [3.0]])
    assert worth(-wanted, wanted).value == 0
    assert worth(wanted, wanted).value == 1
    assert worth(torch.full((3, 1), 1e30), wanted).value == 0
    assert worth(wanted[:1], wanted[:1]).value == 1


@pytest.mark.parametrize("unreadable", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_no_number_counts_as_the_mean(unreadable: float) -> None:
    # Without its first answer the error is the deviation of 1 from the mean 2.
    found = torch.tensor([unreadable, 2.0, 3.0])
    assert worth(found, torch.tensor([1.0, 2.0, 3.0])).value == pytest.approx(1 - 1 / 2)
    assert all(np.isfinite(one).all() for one in Regression().outcomes(found, torch.zeros(3)))


def test_a_column_of_targets_fits_a_row_of_outputs() -> None:
    network = nn.Flatten(0)  # (examples, 1) -> (examples,)
    inputs = torch.tensor([[1.0], [2.0], [4.0]])
    assert float(Regression().loss(network, inputs, inputs + 1)) == pytest.approx(1)


def test_what_does_not_fit() -> None:
    task = Regression().fitted(torch.zeros(4, 2))
    assert task.outputs == 2 and task.misfit(torch.zeros(4, 2)) is None
    assert "expected 2 numbers for each example, got float32 (4, 3)" in str(task.misfit(torch.zeros(4, 3)))
    assert "finite" in str(task.misfit(torch.tensor([[0.0, torch.nan]])))
    assert "got float32 (4, 3)" in str(task.complaint(torch.zeros(4, 3), torch.zeros(4, 9)))
    assert task.uninformative(torch.ones(4, 2)) and not task.uninformative(torch.eye(2))
