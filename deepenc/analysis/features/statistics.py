"""Statistics of one side of a site: NaN where a channel has none, None where the site has none."""

from __future__ import annotations

import torch
from torch import Tensor

from deepenc.analysis.features import formulas
from deepenc.analysis.features.formulas import TINY
from deepenc.analysis.features.parts import Part, Side


def norm(side: Side) -> Tensor:
    """Logarithm of the Euclidean norm of all weights."""
    return formulas.log_norm(side.square)


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
    """Roughness of the kernels, see `formulas.roughness`; only of slots with kernels larger than 1."""
    return side.mean(_roughness)


def _roughness(part: Part) -> Tensor | None:
    dims = [3 + i for i, size in enumerate(part.kernel) if size > 1]
    if not dims:
        return None
    return torch.where(part.shaped, formulas.roughness(part.values, dims), torch.nan)


def profile(side: Side) -> Tensor | None:
    """How well the other channels' profile over the partners fits the row's, see `formulas.profile`."""
    return side.mean(_profile)


def _profile(part: Part) -> Tensor | None:
    width, partners = part.energies.shape
    if partners < 2 or width < 3:
        return None
    own = torch.where(part.shaped[:, None], part.energies / part.energies.mean(dim=1, keepdim=True), 0)
    return torch.where(part.shaped, formulas.profile(own), torch.nan)


def subspace(side: Side) -> Tensor | None:
    """Share of the row's energy in the leading subspace of the other rows, see `formulas.subspace`."""
    rows = side.directions
    share = formulas.subspace(rows, side.cosines if len(rows) <= rows.shape[1] else None)
    return torch.where(rows.any(dim=1), share, torch.nan)


def cosine(side: Side) -> Tensor | None:
    """Largest absolute cosine with any other row of the site, in [0, 1]."""
    if side.width < 2:
        return None
    nearest = formulas.nearest(side.cosines).double()
    return torch.where(side.directions.any(dim=1), nearest, torch.nan)
