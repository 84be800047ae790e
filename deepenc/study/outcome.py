"""What a search comes to: its finalists in two measurements, a configuration to run, and pictures."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from deepenc.arena.estimates.estimate import Estimate
from deepenc.arena.plan import Experiment
from deepenc.arena.record import Record
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, StoreError
from deepenc.study.search import Search
from deepenc.study.trials import values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = "best.yaml"
SHARES: frozenset[str] = frozenset({"damage", "memory"})
"""Objectives that are shares, and written in percent."""


@dataclass(frozen=True)
class Finalist:
    """A defense, and what it was worth in the search and afterwards.

    Attributes:
        defense: As it is to be used.
        trial: Its number; None for a defense that was not searched.
        searched: Each objective, on tuning keys and held-out images; empty for a defense not searched.
        fresh: Each objective, on fresh keys and the judge's images.
        memory: ΔMem / Mem, over the fresh keys.
        damage: Share of accuracy lost, over the fresh keys.
    """

    defense: Defense
    trial: int | None
    searched: tuple[Estimate | None, ...]
    fresh: tuple[Estimate | None, ...]
    memory: Estimate | None
    damage: Estimate | None


def chosen(search: Search, study: Study) -> list[FrozenTrial]:
    """The trials to be measured again: the best, or a front thinned evenly along its first objective.

    Raises:
        ConfigError: No trial is complete.
    """
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        reason = next((t.user_attrs["reason"] for t in reversed(trials) if t.user_attrs.get("reason")), "")
        raise ConfigError(f"none of {len(trials)} trials came to its end; the last: {reason.strip()}")
    if len(search.objectives) == 1:
        return [study.best_trial]
    front = sorted(study.best_trials, key=lambda trial: trial.values[0])
    if len(front) <= search.finalists:
        return front
    steps = max(1, search.finalists - 1)
    return [front[round(i * (len(front) - 1) / steps)] for i in range(search.finalists)]


def defense_of(search: Search, trial: FrozenTrial) -> Defense:
    """The defense of a trial, under a name of its own."""
    return search.variant(trial.params, f"{search.name}-{trial.number}")


def final_experiment(search: Search, winners: Sequence[FrozenTrial]) -> Experiment:
    """The duels of the finalists and of what they are set against, under keys the search has not seen.

    Args:
        search: What was searched.
        winners: From `chosen`.
    """
    defenses = (*(defense_of(search, trial) for trial in winners), *search.against)
    return search.experiment(*defenses, name=f"{search.name}-fresh", keys=search.fresh_keys)


def finalist(
    search: Search,
    of: FrozenTrial | Defense,
    references: Sequence[Record],
    records: Sequence[Record],
    responses: Sequence[float] = (),
) -> Finalist:
    """What is known of a finalist, or of a defense it is set against.

    Args:
        search: What was searched.
        of: A trial or a defense.
        references: Of the search.
        records: Of the fresh duels.
        responses: Response change per fresh key, where an objective asks for it.
    """
    searched: tuple[Estimate | None, ...] = ()
    defense = of if isinstance(of, Defense) else defense_of(search, of)
    if not isinstance(of, Defense):
        own = [Record.model_validate(record) for record in of.user_attrs["records"]]
        searched = tuple(values_of(search, [*references, *own], of.user_attrs["responses"]))
    again = [r for r in records if not r.protected or r.defense == defense.name]
    fresh = tuple(values_of(search, again, responses))
    plain = search.model_copy(update={"objectives": ("memory", "damage")})
    memory, damage = values_of(plain, again)
    number = None if isinstance(of, Defense) else of.number
    return Finalist(defense, number, searched, fresh, memory, damage)


def best_yaml(search: Search, defenses: Sequence[Defense]) -> str:
    """An experiment of the best defenses and what they were set against, as `deepenc run` takes it."""
    experiment = search.experiment(*defenses, *search.against, name=f"{search.name}-best")
    content = experiment.spec() | {"keys": search.fresh_keys}
    del content["seed"]  # each run draws keys of its own
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def importances(study: Study) -> dict[str, dict[str, float]]:
    """How much of each objective's spread each parameter explains (fANOVA); empty where it cannot be told."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    found: dict[str, dict[str, float]] = {}
    if len(complete) < 4:
        return found
    for place, objective in enumerate(study.user_attrs["search"]["objectives"]):
        if len({trial.values[place] for trial in complete}) > 1:
            evaluator = FanovaImportanceEvaluator(seed=0)
            target = partial(_value, place=place)
            found[objective] = get_param_importances(study, evaluator=evaluator, target=target)
    return found


def _value(trial: FrozenTrial, place: int) -> float:
    return float(trial.values[place])


def _values(trial: FrozenTrial, places: Sequence[int]) -> list[float]:
    return [_value(trial, place) for place in places]


def measured(objective: str, value: float) -> str:
    """The value of an objective, as it is printed: shares in percent."""
    return f"{100 * value:.3g} %" if objective in SHARES else f"{value:.3g}"


def write(search: Search, study: Study, defenses: Sequence[Defense], folder: Path) -> list[Path]:
    """Leave the configuration and the pictures in the run's folder.

    Raises:
        StoreError: They cannot be written.
    """
    paths = [folder / BEST]
    try:
        paths[0].write_text(best_yaml(search, defenses), encoding="utf-8")
        for name, figure in _pictures(search, study):
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return paths


def _pictures(search: Search, study: Study) -> Iterator[tuple[str, Figure]]:
    """Optuna's own, one at a time; each is closed when the next is asked for."""
    from matplotlib import pyplot, rc_context
    from matplotlib.ticker import PercentFormatter
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    def finished(title: str, axes: Axes, **objectives: str) -> Figure:
        axes.set_title(title)
        for axis, objective in objectives.items():
            if objective in SHARES:
                getattr(axes, axis).set_major_formatter(PercentFormatter(1.0))
        return cast("Figure", axes.figure)

    def drawn() -> Iterator[tuple[str, Figure]]:
        several = len(search.objectives) > 1
        for place, name in enumerate(search.objectives):
            shown = partial(_value, place=place) if several else None
            axes = plots.plot_optimization_history(study, target=shown, target_name=name)
            yield f"history-{name}", finished(f"{search.name}: {name} of each trial", axes, yaxis=name)
        for first, second in combinations(range(len(search.objectives)), 2):
            x, y = search.objectives[first], search.objectives[second]
            both = partial(_values, places=(first, second))
            axes = plots.plot_pareto_front(study, targets=both, target_names=[x, y])
            yield f"front-{x}-{y}", finished(f"{search.name}: {y} against {x}", axes, xaxis=x, yaxis=y)
        known = importances(study)
        for place, name in enumerate(search.objectives):
            if name not in known:
                continue
            target, evaluator = partial(_value, place=place), FanovaImportanceEvaluator(seed=0)
            axes = plots.plot_param_importances(study, evaluator, target=target, target_name=name)
            yield f"importance-{name}", finished(f"{search.name}: what {name} depends on", axes)

    # Optuna sets a style for all later pictures of the process, and its plots still warn of being new.
    with rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for name, figure in drawn():
            try:
                yield name, figure
            finally:
                pyplot.close(figure)
