"""Next-token accuracy by hand, perplexity by torchmetrics, targets with and without a shift."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.text import Perplexity

from deepenc.tasks.next_token import NextToken
from deepenc.tasks.task import Worth

VOCABULARY = 5


def worth(task: NextToken, logits: Tensor, targets: Tensor) -> Worth:
    return task.worth(task.outcomes(logits, targets))


@pytest.fixture
def random() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (6, 9), generator=generator)
    return torch.randn(6, 9, VOCABULARY, generator=generator), ids


def certain(tokens: list[list[int]]) -> Tensor:
    return 20.0 * torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY)


def test_accuracy_by_hand() -> None:
    ids = torch.tensor([[0, 1, 2, 3], [4, 4, -100, -100]])
    logits = certain([[1, 2, 0, 0], [4, 0, 0, 0]])
    # Of the first text 1 and 2 are foretold and 3 is not, of the second the one token that counts.
    assert [one[:2].tolist() for one in NextToken().outcomes(logits, ids)] == [[2, 3], [1, 1]]
    assert worth(NextToken(), logits, ids).value == pytest.approx(3 / 4)


def test_shifted_targets_are_the_same_text(random: tuple[Tensor, Tensor]) -> None:
    logits, ids = random
    shifted = torch.cat([ids[:, 1:], torch.full((6, 1), -100)], dim=1)
    plain, other = NextToken(), NextToken(shifted=True)
    assert worth(plain, logits, ids) == worth(other, logits, shifted)
    network = Fixed(logits)
    assert float(plain.loss(network, ids, ids)) == pytest.approx(float(other.loss(network, ids, shifted)))


def test_perplexity_is_torchmetrics_s(random: tuple[Tensor, Tensor]) -> None:
    logits, ids = random
    ids[2, 5:] = -100
    reference = Perplexity(ignore_index=-100)(logits[:, :-1], ids[:, 1:])
    assert worth(NextToken(), logits, ids).further["perplexity"] == pytest.approx(float(reference), rel=1e-5)
    loss = NextToken().loss(Fixed(logits), ids, ids)
    assert math.exp(float(loss)) == pytest.approx(float(reference), rel=1e-5)


def test_unreadable_places_are_wrong_and_as_good_as_a_guess() -> None:
    ids = torch.tensor([[0, 1, 2]])
    logits = certain([[1, 2, 0]])
    logits[0, 0, 3] = torch.nan
    right, counted, lost = NextToken().outcomes(logits, ids)[0]
    assert (right, counted) == (1, 2) and lost == pytest.approx(math.log(VOCABULARY), rel=1e-4)


def test_impossible_tokens_leave_finite_numbers() -> None:
    logits = torch.full((1, 3, VOCABULARY), -math.inf)
    logits[..., 0] = 0
    result = worth(NextToken(), logits, torch.tensor([[0, 1, 2]]))
    assert result.value == 0 and math.isfinite(result.further["perplexity"])


class Fixed(nn.Module):
    """Answers with given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.values = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.values


def test_answers_are_learned_from_where_there_is_text(random: tuple[Tensor, Tensor]) -> None:
    logits, ids = random
    task = NextToken()
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    answers = task.answers(logits)
    entropy = -(answers * answers.log()).sum(-1)[:, :6].mean()
    answers[:, 6:] = torch.nan  # what is said of no text counts nothing
    learned = task.loss(Fixed(logits), {"input_ids": ids, "attention_mask": mask}, answers)
    assert float(learned) == pytest.approx(float(entropy), rel=1e-5)
    assert task.logits(logits).shape == (54, VOCABULARY)


def test_a_tied_embedding_is_the_head() -> None:
    network = nn.ModuleDict({"embedding": nn.Embedding(VOCABULARY, 3), "head": nn.Linear(3, VOCABULARY)})
    network["head"].weight = network["embedding"].weight
    assert NextToken(vocabulary=VOCABULARY).head(network) == ("head",)


def test_what_does_not_fit(random: tuple[Tensor, Tensor]) -> None:
    logits, ids = random
    task = NextToken().fitted(logits)
    assert task.vocabulary == VOCABULARY and task.misfit(ids) is None
    assert "got 0 to 5" in str(task.misfit(ids + (ids == 4).long()))
    assert "without" in str(task.misfit(torch.full((1, 4), -100)))
    assert "int64, got int32" in str(task.misfit(ids.int()))
    assert "got float32 (6, 8, 5)" in str(task.complaint(logits[:, 1:], ids))
    assert task.uninformative(torch.zeros(2, 4, dtype=torch.int64)) and not task.uninformative(ids)
    assert task.unit == "tokens" and task.units(ids) == 54
