"""What an attacker knows, holds, and may spend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deepenc.errors import OutOfBudget

Budget = Literal[
    "labelled", "unlabelled", "samples", "steps", "key_fraction", "copies", "drift", "oracle", "trials"
]
"""What a curve can run over: the numbers of a threat model."""

Spent = Literal["samples", "steps", "queries", "trials"]
"""What a meter counts."""


class Threat(BaseModel):
    """A threat model, as data. The defense's algorithm and parameters are always known (Kerckhoffs).

    Attributes:
        name: How tables call it.
        architecture: Whether the attacker knows the victim's architecture, widths included.
        configuration: Whether the attacker knows ΔC per site (the paper's white box).
        key_fraction: Fraction of all confusion positions that the attacker knows, in [0, 1].
        labelled: Labelled images the attacker holds.
        unlabelled: Unlabelled images the attacker holds, none of them among the labelled.
        public_checkpoint: Whether the attacker has the public network that the victim was fine-tuned from.
        copies: Further releases of the same model, under other keys, that the attacker holds.
        drift: Optimiser steps by which the owner fine-tuned the model between one release and the next.
        oracle: Inputs that the authorised model answers.
        trials: Settings or guesses that the attacker may try out.
        point_of: Name of the threat model that this is a point of a curve of.
        samples: Samples the attacker's networks may process; None is without limit.
        steps: Optimiser steps the attacker may take; None is without limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    architecture: bool = True
    configuration: bool = True
    key_fraction: float = Field(0.0, ge=0.0, le=1.0)
    labelled: int = Field(0, ge=0)
    unlabelled: int = Field(0, ge=0)
    public_checkpoint: bool = False
    copies: int = Field(0, ge=0)
    drift: int = Field(0, ge=0)
    oracle: int = Field(0, ge=0)
    trials: int = Field(0, ge=0)
    point_of: str | None = None
    samples: int | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)

    @property
    def family(self) -> str:
        """Name shared by all points of a curve: they are attacked with the same seeds and images."""
        return self.point_of or self.name

    def at(self, budget: Budget, value: float) -> Self:
        """The same threat model with another value of one budget: a point of a curve."""
        name = f"{self.name} {budget}={value:g}"  # `point` reads it
        fields = self.model_dump() | {budget: value, "name": name, "point_of": self.family}
        return type(self).model_validate(fields)


def point(name: str) -> tuple[str, str, float] | None:
    """What `Threat.at` put into a name: the family's name, the budget and its value; None for other names.

    >>> point("thief labelled=50")
    ('thief', 'labelled', 50.0)
    """
    family, _, last = name.rpartition(" ")
    budget, sign, value = last.partition("=")
    if not family or not sign or budget not in get_args(Budget):
        return None
    return family, budget, float(value)


class Needs(BaseModel):
    """The least a threat model must give for an attack to run at all; fields as in `Threat`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: bool = False
    configuration: bool = False
    key_fraction: float = 0.0
    labelled: int = 0
    unlabelled: int = 0
    public_checkpoint: bool = False
    copies: int = 0
    oracle: int = 0
    trials: int = 0

    def missing(self, threat: Threat) -> list[str]:
        """What the threat model does not give, in words; empty when it gives everything."""
        lacks = []
        for field in type(self).model_fields:
            needed, given = getattr(self, field), getattr(threat, field)
            if given < needed:
                lacks.append(field if needed is True else f"{field} >= {needed} (given {given})")
        return lacks

    def union(self, other: Needs) -> Needs:
        """What is needed to run both."""
        fields: dict[str, Any] = {
            field: max(getattr(self, field), getattr(other, field)) for field in type(self).model_fields
        }
        return Needs(**fields)


@dataclass
class Meter:
    """Counts what an attack spends, and stops it at its budget.

    The arena measures: samples are counted by a hook on the networks of the case (and on all copies made of
    them), steps by a hook on torch's optimisers.

    Attributes:
        samples: Samples processed so far.
        steps: Optimiser steps so far.
        queries: Inputs that the authorised model answered.
        trials: Settings or guesses tried out.
        seconds: Wall time of the attack.
        diverged: Whether an optimisation of the attack ran into numbers that are not finite, and went back.
        closed: Whether the attack is over; what its networks do then, before the judge, costs nothing.
    """

    threat: Threat
    samples: int = 0
    steps: int = 0
    queries: int = 0
    trials: int = 0
    seconds: float = 0.0
    diverged: bool = False
    closed: bool = False

    def limit(self, what: Spent) -> int | None:
        """How much the threat model allows in all; None is without limit."""
        threat = self.threat
        limits: dict[Spent, int | None] = {
            "samples": threat.samples,
            "steps": threat.steps,
            "queries": threat.oracle,
            "trials": threat.trials,
        }
        return limits[what]

    def left(self, what: Spent) -> int | None:
        """How much may still be spent; None is without limit."""
        limit = self.limit(what)
        return None if limit is None else limit - int(getattr(self, what))

    def charge(self, samples: int = 0, steps: int = 0, queries: int = 0, trials: int = 0) -> None:
        """Spend from the budget.

        Raises:
            OutOfBudget: More is asked for than the threat model allows.
        """
        if self.closed:
            return
        asked: dict[Spent, int] = {"samples": samples, "steps": steps, "queries": queries, "trials": trials}
        for what, more in asked.items():
            left = self.left(what)
            if more and left is not None and more > left:
                used = int(getattr(self, what)) + more
                raise OutOfBudget(
                    f"threat {self.threat.name!r} allows {self.limit(what)} {what}; "
                    f"the attack asked for {used}"
                )
        for what, more in asked.items():
            setattr(self, what, getattr(self, what) + more)

    def watch(self, network: nn.Module) -> nn.Module:
        """Count every sample that this network, or a deep copy of it, processes."""

        # A closure, not a bound method: deep copies of the network then share this very meter.
        def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            batch = next((x for x in inputs if isinstance(x, torch.Tensor)), None)
            self.charge(samples=1 if batch is None else int(batch.shape[0]))

        network.register_forward_pre_hook(count)
        return network

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Count optimiser steps and wall time while the attack runs."""
        handle = register_optimizer_step_post_hook(lambda *_: self.charge(steps=1))
        started = time.perf_counter()
        try:
            yield self
        finally:
            handle.remove()
            self.seconds += time.perf_counter() - started
