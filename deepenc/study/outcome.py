"""What a search comes to: its finalists in two measurements, a configuration to run, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deepenc.arena.estimates import Estimate
from deepenc.arena.plan import Experiment
from deepenc.arena.record import Record
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, StoreError
from deepenc.study.search import RISING, Search
from deepenc.study.trials import values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = "best.yaml"


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
            figure.savefig(paths[-1], dpi=150)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return paths


def _pictures(search: Search, study: Study) -> list[tuple[str, Figure]]:
    from matplotlib.figure import Figure
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    made: list[tuple[str, Figure]] = []

    def sheet(name: str) -> Any:
        figure = Figure(figsize=(6, 4), layout="constrained")
        made.append((name, figure))
        return figure.subplots()

    for place, objective in enumerate(search.objectives):
        axes = sheet(f"history-{objective}")
        numbers, values = [t.number for t in complete], [t.values[place] for t in complete]
        pick = max if objective in RISING else min
        axes.plot(numbers, values, "o", alpha=0.5, label="trial")
        axes.step(
            numbers, [pick(values[: n + 1]) for n in range(len(values))], where="post", label="best so far"
        )
        axes.set(xlabel="trial", ylabel=objective)
        axes.legend()
    for first, second in _pairs(len(search.objectives)):
        axes = sheet(f"front-{search.objectives[first]}-{search.objectives[second]}")
        for trials, style, label in ((complete, "o", "trial"), (study.best_trials, "D", "front")):
            x, y = [t.values[first] for t in trials], [t.values[second] for t in trials]
            axes.plot(x, y, style, alpha=0.6, label=label)
        axes.set(xlabel=search.objectives[first], ylabel=search.objectives[second])
        axes.legend()
    for name, shares in importances(study).items():
        axes = sheet(f"importance-{name}")
        axes.barh(list(shares)[::-1], list(shares.values())[::-1])
        axes.set(xlabel=f"share of the spread of {name}")
    return made


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(count) for second in range(first + 1, count)]
