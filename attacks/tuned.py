"""An attacker who tries out settings before he attacks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.kit.space import Axis, Space, value_of, varied
from deepenc.arena.kit.training import portion
from deepenc.arena.metrics import checked_scores, judge, most_suspect
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.plugins import build
from deepenc.tasks.examples import Examples


class Tuned(Attack):
    """Search another attack's parameters on images held out for it, then attack with the best.

    Optuna's TPE; the first trial is the attack as it is given. Every trial is charged, and so are its steps
    and samples: of those that are left, each trial may spend an equal share, and the last attack, on all
    images, the rest. A trial that fails counts as failed; if all do, the last one's error ends the attack.
    """

    name: ClassVar[str] = "tuned"

    of: Attack = Field(default_factory=lambda: build("attack", "finetune"))
    """The attack whose parameters are searched."""
    space: Space = Field((Axis(field="lr", low=1e-4, high=0.1, log=True),), min_length=1)
    """Parameter to a list of choices or a range `{low: ..., high: ..., log: true}`; nested parameters with
    dots (`stages.1.lr`)."""
    trials: int = Field(10, ge=1)
    """Settings to try."""
    validation: float = Field(0.2, gt=0, lt=1)
    """Share of the labelled images on which trials are judged."""

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        for axis in self.space:
            for value in axis.ends():
                varied(self.of, {axis.field: value})
        fields = [axis.field for axis in self.space]
        if twice := sorted({field for field in fields if fields.count(field) > 1}):
            raise ValueError(f"space: {twice} are listed twice")
        return self

    @property
    def needs(self) -> Needs:
        """The trials, and what the attack needs on the images that are not held out."""
        own = self.of.needs
        labelled = math.ceil(max(1, own.labelled) / (1 - self.validation)) + 1
        return own.union(Needs(trials=self.trials, labelled=labelled))

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        return varied(self.of, self.best(case)).attack(case)

    def best(self, case: Case) -> dict[str, Any]:
        """The settings that did best on the validation images."""
        from optuna import create_study
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        training, validation = self.split(case)
        smaller = replace(case, labelled=training)
        failure = None
        with _quiet():
            sampler = TPESampler(seed=case.seed % 2**32, n_startup_trials=max(1, min(10, self.trials // 3)))
            study = create_study(direction="maximize", sampler=sampler)
            study.enqueue_trial({a.field: v for a in self.space if a.holds(v := value_of(self.of, a.field))})
            for left in range(self.trials, 0, -1):
                case.meter.charge(trials=1)
                trial = study.ask()
                attack = varied(self.of, {axis.field: axis.suggest(trial) for axis in self.space})
                try:
                    with portion(smaller, left + 1, reserve=left * len(validation)) as part:
                        network = claimed(attack, part)
                    rate = judge(network, validation, case.task, who=attack.name, device=case.device).value
                except Exception as error:  # whatever a setting makes the attack raise is that trial's end
                    failure = error
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    study.tell(trial, rate)
        if failure is not None and all(t.state is TrialState.FAIL for t in study.trials):
            raise failure
        return study.best_params

    def split(self, case: Case) -> tuple[Examples, Examples]:
        """The labelled examples to train on, and those to judge by."""
        count = len(case.labelled)
        held = min(max(1, round(self.validation * count)), count - max(1, self.of.needs.labelled))
        order = torch.randperm(count, generator=case.generator())
        return case.labelled[order[held:]], case.labelled[order[:held]]


def claimed(attack: Attack, case: Case) -> torch.nn.Module:
    """The network that an attack comes to, after removal where it claims only scores.

    Raises:
        ClaimError: It claims neither, or how many to remove is not known.
    """
    claim = attack.attack(case)
    if claim.network is not None:
        return claim.network
    if claim.scores is None or case.allocation is None:
        raise ClaimError(
            f"tuned: {attack.name!r} claims no network, and none can be made of its scores without "
            "`allocation: true` in the threat model; tune a chain of it"
        )
    return case.remove(most_suspect(checked_scores(claim.scores, case.sites, attack.name), case.allocation))


@contextmanager
def _quiet() -> Iterator[None]:
    from optuna import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(level)
