"""Outliers among all statistics at once, by scikit-learn's detectors."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.covariance import MinCovDet
from sklearn.decomposition import PCA
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM

from deepenc.analysis.features import Table, features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors

Values = NDArray[np.float64]

CLIP = 10.0
"""Robust z-scores beyond are all alike: a single wild one shall not hide the others."""
FEWEST = 8
"""Channels below which nothing is an outlier."""


class Outliers(Attack):
    """Suspect outliers among the channels of a site, in all statistics of their weights together.

    scikit-learn's detectors on `deepenc.analysis.features`, in robust z-scores. Channels that weight decay
    killed are outliers too, but do no harm: they are set aside. Needs no data.
    """

    name: ClassVar[str] = "outliers"

    method: Literal["covariance", "isolation-forest", "lof", "svm"] = "covariance"
    """Distance under a robust covariance (minimum covariance determinant, on principal components),
    isolation forest, local outlier factor, or one-class support vector machine."""
    features: tuple[str, ...] | None = None
    """Statistics to use, by name; default: all."""
    trees: int = Field(100, ge=1)
    """Trees of the isolation forest, ``>= 1``."""
    neighbours: int = Field(20, ge=1)
    """Neighbours that set the local outlier factor, ``>= 1``."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of channels that the support vector machine leaves outside, in (0, 1]."""

    @property
    def detects(self) -> Weakness | None:  # type: ignore[override]
        """Loud channels, for the two that see a group of outliers; the others count it as a cluster."""
        return "loud" if self.method in ("covariance", "lof") else None

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, self.features)
        return Claim(scores={name: self._score(table, case.seed) for name, table in tables.items()})

    def _score(self, table: Table, seed: int) -> torch.Tensor:
        away = standardised(table).clamp(-CLIP, CLIP)[table.alive].numpy()
        away = away[:, away.any(axis=0)]
        scores = torch.zeros(len(table.values), dtype=torch.float64)
        if len(away) >= FEWEST and away.shape[1]:
            found = torch.from_numpy(self._outlierness(away, seed % 2**32))
            scores[:] = found.min()
            scores[table.alive] = found
        return scores

    def _outlierness(self, away: Values, state: int) -> Values:
        if self.method == "covariance":
            return robust_distances(away, state)
        if self.method == "isolation-forest":
            forest = IsolationForest(n_estimators=self.trees, random_state=state).fit(away)
            return -np.asarray(forest.score_samples(away), dtype=np.float64)
        if self.method == "svm":
            return -np.asarray(OneClassSVM(nu=self.share).fit(away).score_samples(away), dtype=np.float64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate values", UserWarning)  # equal channels: equal scores
            factor = LocalOutlierFactor(min(self.neighbours, len(away) - 1)).fit(away)
        return -np.asarray(factor.negative_outlier_factor_, dtype=np.float64)


def robust_distances(away: Values, state: int) -> Values:
    """Mahalanobis distances under the covariance of the most concentrated half.

    With few channels the covariance of all features is singular: as many leading principal components are
    used as the channels can bear, five channels to each, ten at most.
    """
    rank = int(np.linalg.matrix_rank(away - away.mean(axis=0)))
    count = max(1, min(len(away) // 5, rank, 10))
    components = PCA(count, svd_solver="full").fit_transform(away)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a determinant of 0: half of the channels are in a subspace
        try:
            distances: Values = MinCovDet(random_state=state).fit(components).mahalanobis(components)
        except ValueError:  # half of them are equal
            distances = np.square(components - np.median(components, axis=0)).sum(axis=1)
    return np.nan_to_num(distances)
