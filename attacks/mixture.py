"""Two clusters of channels, one of the size that the allocation tells."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from deepenc.analysis.features import NAMES, Table, features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.threat import Needs
from deepenc.network.structure import named_tensors

Values = NDArray[np.float64]

CLIP = 10.0
"""Robust z-scores beyond are all alike."""
REGULAR = 0.1
"""Added to variances: a cluster of few channels shall not shrink to a point."""


class Mixture(Attack):
    """Split all channels of the network into two clusters, and suspect the one of the size of ΔC.

    A mixture of two normal distributions (scikit-learn) is fitted to the leading principal components of
    `deepenc.analysis.features`, in robust z-scores within each site, from several starts. Of all clusters
    found, that whose weight is nearest to ΔC / (C + ΔC) is taken for the confusion channels, be it loose or
    tight: they often are the more alike. Channels that weight decay killed are set aside, as they would be
    a cluster of their own. Needs the allocation, no data.
    """

    name: ClassVar[str] = "mixture"
    detects: ClassVar[Weakness | None] = "noise"

    components: int = Field(3, ge=1)
    """Principal components, ``>= 1``."""
    features: tuple[str, ...] | None = None
    """Statistics to use, by name; default: all."""
    starts: int = Field(8, ge=1)
    """Fits from different starts, ``>= 1``."""

    @property
    def needs(self) -> Needs:
        """The allocation."""
        return Needs(allocation=True)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        counts = case.counts()
        tables = features(named_tensors(case.encrypted), case.sites, self.features)
        alive = np.concatenate([table.alive.numpy() for table in tables.values()])
        odds = np.zeros(len(alive))
        if alive.any():
            weight = sum(counts.values()) / int(alive.sum())
            odds[alive] = self._odds(side_by_side(tables)[alive], weight, case.seed)
            odds[~alive] = odds.min()
        cuts = np.cumsum([len(table.values) for table in tables.values()])[:-1]
        parts = np.split(odds, cuts)
        return Claim(scores={n: torch.from_numpy(part) for n, part in zip(tables, parts, strict=True)})

    def _odds(self, away: Values, weight: float, seed: int) -> Values:
        """Log odds of being in the cluster of the given weight, ``(channels,)``."""
        rank = int(np.linalg.matrix_rank(away - away.mean(axis=0))) if away.shape[1] else 0
        if not 0 < weight < 1 or not rank or len(away) < 3:
            return np.zeros(len(away))
        points = PCA(min(self.components, rank), svd_solver="full").fit_transform(away)
        fits = [fit(points, weight, (seed + start) % 2**32) for start in range(self.starts)]
        nearest = min(fits, key=lambda found: float(np.abs(found.weights_ - weight).min()))
        chosen = int(np.abs(nearest.weights_ - weight).argmin())
        logs = np.log(nearest.predict_proba(points).clip(1e-300))
        odds: Values = logs[:, chosen] - logs[:, 1 - chosen]
        return odds


def fit(points: Values, weight: float, state: int) -> GaussianMixture:
    """A mixture of two, started from two points at random and the given weight of the second."""
    model = GaussianMixture(
        2,
        weights_init=[1 - weight, weight],
        reg_covar=REGULAR,
        init_params="random_from_data",
        random_state=state,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(points)


def side_by_side(tables: Mapping[str, Table]) -> Values:
    """All sites' robust z-scores, ``(channels, statistics)``; 0, the typical value, where a site has none."""
    names = [name for name in NAMES if any(name in table for table in tables.values())]
    rows = []
    for table in tables.values():
        away = standardised(table).clamp(-CLIP, CLIP)
        lacking = torch.zeros(len(away), dtype=away.dtype)
        columns = [away[:, table.names.index(name)] if name in table else lacking for name in names]
        rows.append(torch.stack(columns, dim=1) if columns else away)
    return torch.cat(rows).numpy()
