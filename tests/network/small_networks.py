"""Small networks to be made unusual in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
IMAGE, ROW = (torch.randn(8, *shape, generator=GENERATOR) for shape in ((3, 4, 4), (3,)))
Case = tuple[nn.Module, Any]


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1)),
        *(nn.ReLU(), nn.Flatten(), nn.Linear(128, 5), nn.ReLU(), nn.Linear(5, 2)),
    )


class Layers(nn.Module):
    """Three linear layers, `first` with 6 outputs, and how they are used."""

    def __init__(self, use: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x) if self.use else self.last(self.second(self.first(x).relu()).relu())


def layers(use: Callable[[Any, Tensor], Any] | None = None, **attributes: Any) -> Case:
    model = Layers(use)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model, ROW


@dataclass
class Answer:
    """An output type that no library knows."""

    logits: Tensor
    features: Tensor
