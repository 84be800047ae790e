"""An attack as an experiment lists it: with its threat models, its victims, its budget's curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepenc.arena.case import Attack
from deepenc.arena.threat import Budget, Threat
from deepenc.plugins import parse


class Curve(BaseModel):
    """One budget of the threat models, over a grid.

    Attributes:
        over: Which.
        values: The grid, in any order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: Budget
    values: tuple[float, ...] = Field(min_length=1)


class Entry(BaseModel):
    """An attack in an experiment.

    Attributes:
        attack: The attack, or its spec. In YAML the entry itself may be the spec, with the other fields
            beside the attack's own parameters.
        threats: Names of the threat models it runs under; default: all.
        victims: Labels of the victims it is run on; default: all. (An attacker's own network must be
            another one than the victim.)
        label: How tables call it; default: the attack's name.
        keys: Keys it is fought under at most; default: the experiment's.
        curve: In place of each threat model the attack meets one for every value of a budget, and at each
            so do the references.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: Attack
    threats: tuple[str, ...] | None = None
    victims: tuple[str, ...] | None = None
    label: str = ""
    keys: int | None = Field(None, ge=1)
    curve: Curve | None = None

    def meets(self, threat: Threat) -> tuple[Threat, ...]:
        """The threat models that one of the experiment's stands for."""
        if self.threats is not None and threat.name not in self.threats:
            return ()
        if self.curve is None:
            return (threat,)
        return tuple(threat.at(self.curve.over, value) for value in self.curve.values)

    @model_validator(mode="before")
    @classmethod
    def _from_spec(cls, data: Any) -> Any:
        if isinstance(data, Attack):
            return {"attack": data, "label": data.name}
        if isinstance(data, Mapping) and "attack" in data:
            return data
        spec = parse(data)
        own = {key: spec.pop(key) for key in cls.model_fields if key in spec and key != "attack"}
        return {"attack": spec, "label": spec["name"]} | own
