"""Folders of data in the layouts that victims read, of random content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from deepenc.victims.models import CifarResNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CIFAR-10, CIFAR-100 and a ResNet-20 whose running statistics are unlike its defaults."""
    rng = np.random.default_rng(0)
    for name, classes, sizes in (("cifar10", 10, (30, 50)), ("cifar100", 100, (90, 60))):
        (tmp_path / name).mkdir()
        for part, count in zip(("train", "test"), sizes, strict=True):
            images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            labels = rng.integers(0, classes, count, dtype=np.uint8)
            np.savez(tmp_path / name / f"{part}.npz", images=images, labels=labels)
    (tmp_path / "cifar10_resnets").mkdir()
    torch.manual_seed(0)
    model = CifarResNet(20)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "cifar10_resnets" / "resnet20-abc.th")
    return tmp_path
