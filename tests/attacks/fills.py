"""What planted confusion channels are filled with, and comparing networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepenc.network.sites import Role, Slot


def ruinous(slot: Slot, shape: tuple[int, ...], victim: Tensor, generator: torch.Generator) -> Tensor:
    """Always on, and of great weight."""
    if slot.role in (Role.SHIFT, Role.BIAS):
        return torch.full(shape, 3.0)
    if slot.role is Role.OUTGOING:
        return 3 * torch.randn(shape, generator=generator)
    return 0.1 * torch.randn(shape, generator=generator).abs() + 0.1


def oversized(slot: Slot, shape: tuple[int, ...], victim: Tensor, generator: torch.Generator) -> Tensor:
    """Weights ten times as large as the victim's."""
    values = 10 * victim.std() * torch.randn(shape, generator=generator)
    return values.abs() + 0.1 if slot.role is Role.VARIANCE else values


def same(network: nn.Module, other: nn.Module) -> bool:
    """Whether all tensors of two networks are equal."""
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
