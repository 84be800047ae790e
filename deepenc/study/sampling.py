"""Where the next trial is: Optuna's samplers, kept from trying anything twice."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deepenc.arena.kit.space import Axis
from deepenc.errors import ConfigError
from deepenc.study.search import Search, size

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

ENUMERABLE = 4096
"""Points of a space that are listed one by one."""
ATTEMPTS, DRAWS = 8, 1000
"""Proposals of Optuna's sampler, and then points at random, before the space counts as used up."""


def distribution(axis: Axis) -> BaseDistribution:
    """An axis, as Optuna writes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = axis.low, axis.high
    if low is None or high is None:
        return CategoricalDistribution(axis.choices)
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=axis.log)
    return FloatDistribution(low, high, log=axis.log)


def identity(search: Search, values: Mapping[str, Any]) -> str:
    """Two settings with the same identity make the same defense."""
    try:
        return json.dumps(search.variant(values).spec(), sort_keys=True)
    except ConfigError:
        return json.dumps(dict(values), sort_keys=True)


def points(search: Search) -> set[str] | None:
    """All defenses of a space; None where there are too many to list."""
    number = size(search.space)
    if number is None or number > ENUMERABLE:
        return None
    return {identity(search, values) for values in every(search.space)}


def every(space: tuple[Axis, ...]) -> list[dict[str, Any]]:
    """All settings of a space without an endless axis."""
    ranges = [
        axis.choices
        or (
            range(axis.low, axis.high + 1) if isinstance(axis.low, int) and isinstance(axis.high, int) else ()
        )
        or (axis.low,)
        for axis in space
    ]
    fields = [axis.field for axis in space]
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*ranges)]


def sampler(search: Search, seed: int, parallel: bool) -> BaseSampler:
    """TPE for one objective, NSGA-II for several; neither proposes a defense that was tried already.

    Args:
        search: What is searched.
        seed: Must differ from one command to the next on the same study, lest draws repeat.
        parallel: Whether several trials run at once.
    """
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

    startup = max(1, min(10, search.trials // 3))
    inner: BaseSampler
    if len(search.objectives) == 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna 4 calls both options experimental
            inner = TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=parallel)
    else:
        inner = NSGAIISampler(seed=seed, population_size=max(4, min(50, search.trials // 4)))
    space = {axis.field: distribution(axis) for axis in search.space}
    rng = np.random.default_rng(seed)
    chance = RandomSampler(seed=seed)

    class Distinct(BaseSampler):
        """Asks the sampler inside for whole settings, and again where one was tried already."""

        def infer_relative_search_space(
            self, study: Study, trial: FrozenTrial
        ) -> dict[str, BaseDistribution]:
            return space

        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
        ) -> dict[str, Any]:
            before = study.get_trials(deepcopy=False)
            seen = {
                identity(search, t.params)
                for t in before
                if t.number != trial.number and t.state != TrialState.WAITING and len(t.params) == len(space)
            }
            for attempt in range(ATTEMPTS + DRAWS):
                values = self._proposal(inner if attempt < ATTEMPTS else chance, study, trial)
                if identity(search, values) not in seen:
                    return values
            number = size(search.space)
            if number is not None and number <= ENUMERABLE:
                left = [v for v in every(search.space) if identity(search, v) not in seen]
                if left:
                    return left[int(rng.integers(len(left)))]
            return values

        def _proposal(self, of: BaseSampler, study: Study, trial: FrozenTrial) -> dict[str, Any]:
            several = {field: d for field, d in space.items() if not d.single()}
            found = of.sample_relative(study, trial, several) if several else {}
            for field, d in space.items():
                if field not in found:
                    found[field] = of.sample_independent(study, trial, field, d)
            return {field: found[field] for field in space}

        def sample_independent(
            self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            return chance.sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study: Study, trial: FrozenTrial) -> None:
            inner.before_trial(study, trial)

        def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
            inner.after_trial(study, trial, state, values)

    return Distinct()
