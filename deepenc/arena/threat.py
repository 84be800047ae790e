"""What an attacker knows, holds, and may spend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deepenc.errors import OutOfBudget


class Threat(BaseModel):
    """A threat model, as data. The defense's algorithm and parameters are always known (Kerckhoffs).

    Attributes:
        name: How tables call it.
        architecture: Whether the attacker knows the victim's architecture, widths included.
        configuration: Whether the attacker knows ΔC per site (the paper's white box).
        key_fraction: Fraction of all confusion positions that the attacker knows, in [0, 1].
        labelled: Labelled images the attacker holds.
        unlabelled: Unlabelled images the attacker holds, none of them among the labelled.
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
    samples: int | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)


class Needs(BaseModel):
    """The least a threat model must give for an attack to run at all; fields as in `Threat`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: bool = False
    configuration: bool = False
    key_fraction: float = 0.0
    labelled: int = 0
    unlabelled: int = 0

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
        seconds: Wall time of the attack.
        closed: Whether the attack is over; what its networks do then, before the judge, costs nothing.
    """

    threat: Threat
    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    closed: bool = False

    def charge(self, samples: int = 0, steps: int = 0) -> None:
        """Spend from the budget.

        Raises:
            OutOfBudget: More is asked for than the threat model allows.
        """
        if self.closed:
            return
        for what, used, limit in (
            ("samples", self.samples + samples, self.threat.samples),
            ("steps", self.steps + steps, self.threat.steps),
        ):
            if limit is not None and used > limit:
                raise OutOfBudget(
                    f"threat {self.threat.name!r} allows {limit} {what}; the attack asked for {used}"
                )
        self.samples += samples
        self.steps += steps

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
