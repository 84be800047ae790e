"""Samplers of Optuna's that try nothing twice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from deepenc.study.search import Search, size
from deepenc.study.space import ENUMERABLE, distribution, every, identity

ATTEMPTS, DRAWS = 8, 1000
"""Proposals of Optuna's sampler, and then points at random, before the space counts as used up."""


class Distinct(BaseSampler):
    """Asks the sampler inside for whole settings, and again where one was tried already.

    Args:
        search: What is searched.
        inner: Optuna's sampler.
        seed: Of what is drawn where that has nothing new.
    """

    def __init__(self, search: Search, inner: BaseSampler, seed: int) -> None:
        self._search, self._inner = search, inner
        self._space = {axis.field: distribution(axis) for axis in search.space}
        self._rng, self._chance = np.random.default_rng(seed), RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space."""
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A setting that no other trial has, where there is one.

        Values that the trial has already stay: its command died while they were stored.
        """
        seen = {
            identity(self._search, t.params)
            for t in study.get_trials(deepcopy=False)
            if t.number != trial.number
            and t.state != TrialState.WAITING
            and len(t.params) == len(self._space)
        }
        for attempt in range(ATTEMPTS + DRAWS):
            values = self._proposal(self._inner if attempt < ATTEMPTS else self._chance, study, trial)
            if identity(self._search, values) not in seen:
                return values
        number = size(self._search.space)
        if number is not None and number <= ENUMERABLE:
            possible = [v for v in every(self._search.space) if v | trial.params == v]
            left = [v for v in possible if identity(self._search, v) not in seen]
            if left:
                return left[int(self._rng.integers(len(left)))]
        return values

    def _proposal(self, of: BaseSampler, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        several = {field: d for field, d in self._space.items() if not d.single()}
        found = of.sample_relative(study, trial, several) if several else {}
        for field, d in self._space.items():
            if field not in found:
                found[field] = of.sample_independent(study, trial, field, d)
        return {field: found[field] for field in self._space} | trial.params

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value at random."""
        return self._chance.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """See Optuna."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """See Optuna."""
        self._inner.after_trial(study, trial, state, values)


def sampler(search: Search, seed: int, parallel: bool) -> BaseSampler:
    """TPE for one objective, NSGA-II for several; neither proposes a defense that was tried already.

    Args:
        search: What is searched.
        seed: Must differ from one command to the next on the same study, lest draws repeat.
        parallel: Whether several trials run at once.
    """
    inner: BaseSampler
    if len(search.objectives) == 1:
        startup = max(1, min(10, search.trials // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna 4 calls both options experimental
            inner = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=parallel)
    else:
        inner = NSGAIISampler(seed=seed, population_size=max(4, min(50, search.trials // 4)))
    return Distinct(search, inner, seed)
