"""What a network without labels can be asked: entropies as scipy has them, statistics that agree or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import nn

from deepenc.analysis.batchnorm import batchnorms, norm_moments
from deepenc.arena.kit.unlabelled import inconsistency, information, mismatches


def test_information_against_scipy():
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chances = logits.softmax(1).numpy()
    expected = scipy_entropy(chances.mean(0)) - np.mean([scipy_entropy(row) for row in chances])
    assert information(logits) == pytest.approx(expected)
    assert float(information(5 * logits)) < math.log(5)
    assert information(torch.tensor([[100.0, 0, 0]] * 4)) == pytest.approx(0, abs=1e-9)  # sure, and no good


def test_information_is_the_most_where_every_class_is_sure():
    assert float(information(100 * torch.eye(5))) == pytest.approx(math.log(5), abs=1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_mismatches_are_nothing_where_statistics_are_right(plant, live):
    case = plant(unlabelled=32).case
    network = case.copy()
    network.bn1.train(live)

    def mismatch():
        with torch.no_grad(), mismatches(network, batchnorms(case.encrypted)) as found:
            network(case.unlabelled.inputs)
        return [float(value) for value in found]

    [before] = mismatch()
    moments = norm_moments(case.encrypted, case.unlabelled.inputs)["bn1"]
    case.encrypted.bn1.running_mean.copy_(moments.mean)
    case.encrypted.bn1.running_var.copy_(moments.variance)
    assert before > 0.01 and mismatch() == [pytest.approx(0, abs=1e-6)]
    assert len(network.bn1._forward_pre_hooks) == len(case.encrypted.bn1._forward_pre_hooks)


def test_inconsistency_is_nothing_where_statistics_are_right(plant):
    case = plant(unlabelled=32).case
    network = case.copy()
    before = inconsistency(network, case.unlabelled.inputs)
    moments = norm_moments(network, case.unlabelled.inputs)["bn1"]
    network.bn1.running_mean.copy_(moments.mean)
    network.bn1.running_var.copy_(moments.variance)
    assert before > 0.01 > inconsistency(network, case.unlabelled.inputs)
    network.bn1 = nn.Identity()
    assert inconsistency(network, case.unlabelled.inputs) == 0
