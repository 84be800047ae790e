"""Statistics of rows of weights, one row a channel, differentiable.

Attacks look at them in a table (`features`); a defense that hides from these attacks optimises the very same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-30
"""What logarithms and divisions take for zero."""


def log_norm(square: Tensor) -> Tensor:
    """Logarithm of the norms of rows whose sums of squares are given, ``(width,)``."""
    return square.clamp_min(TINY**2).log() / 2


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, deviation, skewness and excess kurtosis of each row, ``(width,)``; of ``(width, entries)``."""
    mean = rows.mean(dim=1, dtype=torch.float64)
    away = rows - mean.to(rows.dtype)[:, None]
    squares = away * away
    variance = squares.mean(dim=1, dtype=torch.float64).clamp_min(TINY)
    skew = (squares * away).mean(dim=1, dtype=torch.float64) / variance**1.5
    kurtosis = (squares * squares).mean(dim=1, dtype=torch.float64) / variance**2 - 3
    return mean, variance.sqrt(), skew, kurtosis


def roughness(kernels: Tensor, dims: Sequence[int]) -> Tensor:
    """Minus the products of adjacent taps, over the energy (Moran's I): high is rough.

    White noise has 0 on average, smooth kernels are below.

    Args:
        kernels: ``(width, ...)``.
        dims: Along which taps are adjacent, at least one.
    """
    products = [
        (part := kernels.movedim(dim, -1))[..., 1:].mul(part[..., :-1]).flatten(1).sum(1, dtype=torch.float64)
        for dim in dims
    ]
    energy = kernels.square().flatten(1).sum(dim=1, dtype=torch.float64).clamp_min(TINY)
    return -torch.stack(products).sum(dim=0) / energy


def profile(energies: Tensor) -> Tensor:
    """How well the scales of the other channels' weights, partner by partner, fit the row's: high is shared.

    Log-likelihood ratio for each weight of two centred normal models: the variance at each partner is in
    proportion to the other channels' mean square there, or the same at all. The row's own scale is free.

    Args:
        energies: Mean square of each channel at each partner, ``(width, partners)``, of mean 1 over the
            partners, so that all channels count alike; 0 for channels that shall not count.
    """
    others = (energies.sum(dim=0) - energies).clamp_min(0) / (len(energies) - 1) + 1e-6  # dead partners
    ratio: Tensor = -((energies / others).mean(dim=1).clamp_min(TINY).log() + others.log().mean(dim=1)) / 2
    return ratio


def subspace(directions: Tensor, cosines: Tensor | None = None) -> Tensor:
    """Share of each row's energy that lies in the leading subspace of the other rows, in [0, 1].

    The subspace is soft: a direction in which the other rows have the energy e counts by e / (e + λ), λ the
    mean energy of all directions. With rows W of norm 1, A = WᵀW + λ and the leverage h = wᵀA⁻¹w of a row,
    Sherman and Morrison give what the share is without it: 1 - λ wᵀ(A - wwᵀ)⁻¹w = 1 - λ h / (1 - h). So one
    inverse does for all rows, of the smaller of WᵀW and WWᵀ.

    Args:
        directions: Rows of norm 1, or 0 for those that shall not count; ``(width, entries)``.
        cosines: ``WWᵀ``, where it is known.
    """
    width, entries = directions.shape
    ridge = max(float(directions.detach().any(dim=1).sum()), 1.0) / min(width, entries)
    if width <= entries:
        gram = directions @ directions.T if cosines is None else cosines
        leverage = 1 - ridge * _inverse(gram.double(), ridge).diagonal()
    else:
        double = directions.double()
        leverage = ((double @ _inverse(double.T @ double, ridge)) * double).sum(dim=1)
    return 1 - ridge * leverage / (1 - leverage)


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


def nearest(cosines: Tensor) -> Tensor:
    """Largest absolute cosine with any other row, in [0, 1], from those of all rows with each other."""
    return cosines.abs().fill_diagonal_(0).amax(dim=1)
