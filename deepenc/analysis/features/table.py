"""The feature table: every statistic of every channel of every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepenc.analysis.features import relations, statistics
from deepenc.analysis.features.parts import Side, SiteChannels
from deepenc.errors import ConfigError, near
from deepenc.network.sites import Site

SIDES: Mapping[str, Callable[[Side], Tensor | None]] = {
    "norm": statistics.norm,
    "mean": statistics.mean,
    "deviation": statistics.deviation,
    "skew": statistics.skew,
    "kurtosis": statistics.kurtosis,
    "ks": statistics.ks,
    "ad": statistics.ad,
    "energy": statistics.energy,
    "roughness": statistics.roughness,
    "profile": statistics.profile,
    "subspace": statistics.subspace,
    "cosine": statistics.cosine,
}
"""Statistics of one side: ``NAME_in`` of the incoming weights, ``NAME_out`` of the outgoing ones."""

CHANNELS: Mapping[str, Callable[[SiteChannels], Tensor | None]] = {
    "bias": relations.bias,
    "scale": relations.scale,
    "shift": relations.shift,
    "centre": relations.centre,
    "variance": relations.variance,
    "variance_given_in": relations.variance_given_in,
    "out_given_scale": relations.out_given_scale,
    "out_given_in": relations.out_given_in,
    "balance": relations.balance,
}
"""Statistics of the whole channel."""

NAMES = (*(f"{name}_{side}" for name in SIDES for side in ("in", "out")), *CHANNELS)
"""All statistics, as `features` takes and gives them."""

NORMAL = 1.4826
"""Makes the median absolute deviation of a normal distribution its standard deviation."""
ROUNDING = 1e-6
"""Spread, relative to the values, below which they count as equal: what products in float32 leave of it."""


@dataclass(frozen=True, eq=False)
class Table:
    """Statistics of a site's channels.

    Attributes:
        names: The statistics, one a column.
        values: ``(width, statistics)``, float64 on the CPU, finite.
        alive: Whether a channel's weights, on one side at least, are not negligible beside the site's median,
            ``(width,)``. Weight decay kills channels: they are like no other, but do nothing either.
    """

    names: tuple[str, ...]
    values: Tensor
    alive: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """One statistic, ``(width,)``."""
        return self.values[:, self.names.index(name)]

    def __contains__(self, name: object) -> bool:
        """Whether the site has the statistic."""
        return name in self.names


def features(
    tensors: Mapping[str, Tensor], sites: Iterable[Site], names: Sequence[str] | None = None
) -> dict[str, Table]:
    """Compute statistics of all channels from the weights alone.

    What a site lacks (the roughness of a linear layer's kernels, the scale of a layer that no normalisation
    follows) is left out of its table. A single channel without a value, such as the shape of weights that are
    zero or what is left of a dead channel, is given the median of the others.

    Args:
        tensors: State dict of the network, or `deepenc.network.structure.named_tensors`; on any device.
        sites: Its sites.
        names: Statistics wanted, of `NAMES`; default: all.

    Returns:
        Site name to table, its columns in the order of ``names``.

    Raises:
        ConfigError: There is no statistic of a name.
        SiteError: The sites are another network's.
    """
    names = NAMES if names is None else tuple(names)
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"there is no statistic {name!r} of channels; {near(name, NAMES)}")
    tables = {}
    with torch.no_grad():
        for site in sites:
            channels = SiteChannels(tensors, site)
            found = {name: values for name in names if (values := _statistic(name, channels)) is not None}
            columns = [_filled(values) for values in found.values()]
            values = torch.stack(columns, dim=1) if columns else torch.empty(site.width, 0).double()
            tables[site.name] = Table(tuple(found), values, channels.alive)
    return tables


def _statistic(name: str, channels: SiteChannels) -> Tensor | None:
    if name in CHANNELS:
        return CHANNELS[name](channels)
    name, _, end = name.rpartition("_")
    side = channels.incoming if end == "in" else channels.outgoing
    return None if side is None else SIDES[name](side)


def _filled(values: Tensor) -> Tensor:
    values = values.double()
    finite = torch.isfinite(values)
    if finite.all():
        return values
    return torch.where(finite, values, values[finite].median() if finite.any() else 0.0)


def standardised(table: Table) -> Tensor:
    """Robust z-scores of every statistic within its site, ``(width, statistics)``."""
    return robust(table.values)


def robust(values: Tensor) -> Tensor:
    """Distances from the median in median absolute deviations (times 1.4826), column by column.

    Where more than half of the values are equal, in mean absolute deviations; 0 where all are.

    Args:
        values: ``(channels, columns)``, float64 on the CPU.
    """
    away = values.numpy() - np.median(values.numpy(), axis=0)
    size = ROUNDING * np.abs(values.numpy()).max(axis=0, initial=0.0)
    distances = np.abs(away)
    spread = np.median(distances, axis=0)
    spread = np.where(spread > size, spread, distances.mean(axis=0))
    return torch.from_numpy(np.divide(away, NORMAL * spread, out=np.zeros_like(away), where=spread > size))
