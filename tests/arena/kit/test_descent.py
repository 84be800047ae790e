"""Descent: as plain Adam where nothing goes wrong, back to the last finite point where it does."""

import pytest
import torch

from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.tiny import host_defense, tiny_subject
from deepenc.arena.kit.descent import descend
from deepenc.arena.threat import Threat


def case_with(**threat):
    encryption = Encryption.of(tiny_subject(), host_defense(), bytes(32))
    return build_case(encryption, Threat(name="t", **threat), 1, 2, torch.device("cpu"))


def test_it_is_adam():
    own, theirs = torch.tensor([3.0, -2.0]), torch.tensor([3.0, -2.0], requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(7):
        adam.zero_grad()
        theirs.square().sum().backward()
        adam.step()
    with torch.no_grad():
        assert descend(case_with(), [own], lambda: own.square().sum(), steps=7, lr=0.1).steps == 7
    assert torch.equal(own, theirs.detach())
    assert not own.requires_grad and own.grad is None


def test_steps_are_cut_to_what_is_left_and_counted():
    case, x = case_with(steps=5), torch.ones(1)
    with case.meter.running():
        assert descend(case, [x], lambda: x.square().sum(), steps=3, lr=0.1) == (3, False)
        assert descend(case, [x], lambda: x.square().sum(), steps=3, lr=0.1) == (2, False)
        assert descend(case, [x], lambda: x.square().sum(), steps=3, lr=0.1) == (0, False)
    assert case.meter.steps == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_gives_the_last_finite_point(bad):
    case, x = case_with(), torch.zeros(1)
    seen = []

    def loss():
        seen.append(float(x.detach()))
        return (x - 1).square().sum() * (bad if len(seen) == 3 else 1.0)

    assert descend(case, [x], loss, steps=9, lr=0.1) == (2, True)
    assert bool(x.isfinite())
    # The step that led to the bad loss is taken back.
    assert float(x) == seen[1]


def test_weights_that_are_not_finite_are_taken_back():
    case, x = case_with(), torch.ones(1)
    assert descend(case, [x], lambda: x.square().sum(), steps=5, lr=float("inf")).diverged
    assert float(x) == 1.0


def test_unused_parameters_stay():
    x, y = torch.ones(1), torch.ones(1)
    descend(case_with(), [x, y], lambda: x.square().sum(), steps=2, lr=0.1)
    assert float(y) == 1.0 and float(x) < 1.0
