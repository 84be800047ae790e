"""A planted network: two sites, one of them with a BatchNorm, all of whose values are distinct."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepenc.network.sites import Role, Site, Slot


@pytest.fixture
def planted() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    net = nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 40, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(40, 5),
    )  # fmt: skip
    counter = 1.0
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(counter, counter + tensor.numel()).reshape(tensor.shape) / 64)
            counter += tensor.numel()
        assert name
    first = (
        Slot("0.weight", 0, Role.INCOMING), Slot("0.bias", 0, Role.BIAS), Slot("1.weight", 0, Role.SCALE),
        Slot("1.bias", 0, Role.SHIFT), Slot("1.running_mean", 0, Role.MEAN),
        Slot("1.running_var", 0, Role.VARIANCE), Slot("3.weight", 1, Role.OUTGOING),
    )  # fmt: skip
    second = (
        Slot("3.weight", 0, Role.INCOMING), Slot("3.bias", 0, Role.BIAS), Slot("6.weight", 1, Role.OUTGOING),
    )  # fmt: skip
    return net.eval(), torch.zeros(1, 3, 4, 4), (Site("0", 20, first), Site("3", 40, second))
