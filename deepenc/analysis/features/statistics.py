"""Statistics of one side of a site: NaN where a channel has none, None where the site has none."""

from __future__ import annotations

import torch
from torch import Tensor

from deepenc.analysis.features.parts import Part, Side

TINY = 1e-30
"""What logarithms take for zero."""


def norm(side: Side) -> Tensor:
    """Logarithm of the Euclidean norm of all weights."""
    return side.square.clamp_min(TINY**2).log() / 2


def mean(side: Side) -> Tensor | None:
    """Mean of the row."""
    return side.mean(lambda part: part.moments[0])


def deviation(side: Side) -> Tensor | None:
    """Standard deviation of the row."""
    return side.mean(lambda part: part.moments[1])


def skew(side: Side) -> Tensor | None:
    """Skewness of the row."""
    return side.mean(lambda part: part.moments[2])


def kurtosis(side: Side) -> Tensor | None:
    """Excess kurtosis of the row."""
    return side.mean(lambda part: part.moments[3])


def ks(side: Side) -> Tensor | None:
    """Kolmogorov-Smirnov distance of the row from the whole slot."""
    return side.mean(lambda part: torch.from_numpy(part.distances.ks))


def ad(side: Side) -> Tensor | None:
    """Anderson-Darling distance of the row from the whole slot, as a logarithm."""
    return side.mean(lambda part: torch.from_numpy(part.distances.ad).clamp_min(TINY).log())


def energy(side: Side) -> Tensor | None:
    """Energy distance of the row from the whole slot."""
    return side.mean(lambda part: torch.from_numpy(part.distances.energy))


def roughness(side: Side) -> Tensor | None:
    """Minus the products of adjacent taps of the kernels, over the energy (Moran's I): high is rough.

    White noise has 0 on average, smooth kernels are below. Only of slots with kernels larger than 1.
    """
    return side.mean(_roughness)


def _roughness(part: Part) -> Tensor | None:
    dims = [3 + i for i, size in enumerate(part.kernel) if size > 1]
    if not dims:
        return None
    products = torch.zeros(part.width, dtype=torch.float64)
    for dim in dims:
        size = part.values.shape[dim]
        pairs = part.values.narrow(dim, 0, size - 1) * part.values.narrow(dim, 1, size - 1)
        products += pairs.flatten(1).sum(dim=1, dtype=torch.float64)
    rough = -products / part.rows.square().sum(dim=1, dtype=torch.float64)
    return torch.where(part.shaped, rough, torch.nan)


def profile(side: Side) -> Tensor | None:
    """How well the scales of the other channels' weights, partner by partner, fit the row's: high is shared.

    Log-likelihood ratio for each weight of two centred normal models: the variance at each partner is in
    proportion to the other channels' mean square there, or the same at all. The row's own scale is free.
    """
    return side.mean(_profile)


def _profile(part: Part) -> Tensor | None:
    width, partners = part.energies.shape
    if partners < 2 or width < 3:
        return None
    # All channels count alike, whatever their norm, unless it is dead.
    own = torch.where(part.shaped[:, None], part.energies / part.energies.mean(dim=1, keepdim=True), 0)
    others = (own.sum(dim=0) - own).clamp_min(0) / (width - 1) + 1e-6  # a floor for dead partners
    ratio = -((own / others).mean(dim=1).log() + others.log().mean(dim=1)) / 2
    return torch.where(part.shaped, ratio, torch.nan)


def subspace(side: Side) -> Tensor | None:
    """Share of the row's energy that lies in the leading subspace of the other rows, in [0, 1].

    The subspace is soft: a direction in which the other rows have the energy e counts by e / (e + λ), λ the
    mean energy of all directions. With rows W of norm 1, A = WᵀW + λ and the leverage h = wᵀA⁻¹w of a row,
    Sherman and Morrison give what the share is without it: 1 - λ wᵀ(A - wwᵀ)⁻¹w = 1 - λ h / (1 - h). So one
    inverse does for all rows, of the smaller of WᵀW and WWᵀ.
    """
    rows = side.directions
    width, entries = rows.shape
    alive = rows.any(dim=1)
    ridge = max(float(alive.sum()), 1.0) / min(width, entries)
    if width <= entries:
        inverse = _inverse(side.cosines.double(), ridge)
        leverage = 1 - ridge * inverse.diagonal()
    else:
        double = rows.double()
        leverage = ((double @ _inverse(double.T @ double, ridge)) * double).sum(dim=1)
    share = 1 - ridge * leverage / (1 - leverage)
    return torch.where(alive, share, torch.nan)


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    regular = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))


def cosine(side: Side) -> Tensor | None:
    """Largest absolute cosine with any other row of the site, in [0, 1]."""
    if side.width < 2:
        return None
    nearest = side.cosines.abs().fill_diagonal_(0).amax(dim=1).double()
    return torch.where(side.directions.any(dim=1), nearest, torch.nan)
