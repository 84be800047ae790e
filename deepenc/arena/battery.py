"""Batteries: fixed, versioned lists of attacks with their budgets, so that results can be compared."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepenc.arena.case import Attack
from deepenc.arena.entry import Entry
from deepenc.arena.threat import Threat
from deepenc.plugins import get, names


class Battery(BaseModel):
    """Attacks with their budgets, under threat models, by one name.

    A battery never changes once it is published: a better one is another version. Whoever names it says what
    was tried, and under which threat models.

    Attributes:
        name: With its version, such as ``standard-1``.
        summary: What it is for, in a line.
        why: What each attack is in it for, by its label.
        threats: Threat models.
        attacks: Attacks, as in an experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "battery"

    name: str
    summary: str = ""
    why: dict[str, str] = Field(default_factory=dict)
    threats: tuple[Threat, ...] = Field(min_length=1)
    attacks: tuple[Entry, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _with_reasons(cls, data: Any) -> Any:
        """Take the reason out of each attack's entry."""
        if not isinstance(data, dict) or "why" in data:
            return data
        entries, why = [], {}
        for entry in data.get("attacks", ()):
            if isinstance(entry, dict) and "why" in entry:
                entry = dict(entry)
                why[str(entry.get("label") or entry.get("name"))] = entry.pop("why")
            entries.append(entry)
        return data | {"attacks": entries, "why": why}

    def completed(self) -> Self:
        """With every registered attack that it does not hold, as it is by default.

        Each meets the first threat model of the battery that gives it all that it needs. Attacks that are
        made of others are left out: they are as many as one likes.
        """
        held = {type(entry.attack) for entry in self.attacks}
        more = []
        for name in names("attack"):
            cls = get("attack", name)
            if cls in held or any(_holds_attacks(field.annotation) for field in cls.model_fields.values()):
                continue
            attack = cls()
            meets = [t.name for t in self.threats if not attack.needs.missing(t)]
            if meets:
                more.append(Entry(attack=attack, label=name, threats=(meets[0],)))
        return self.model_copy(update={"name": f"all of {self.name}", "attacks": (*self.attacks, *more)})


def _holds_attacks(annotation: Any) -> bool:
    inner = getattr(annotation, "__args__", ())
    own = isinstance(annotation, type) and issubclass(annotation, Attack)
    return own or any(_holds_attacks(part) for part in inner)


def battery(name: str) -> Battery:
    """A battery by its name; ``quick`` and ``standard`` are their latest versions, ``all`` is every attack.

    Raises:
        PluginError: There is no such battery.
    """
    if name == "all":
        return battery("standard").completed()
    known = names("battery")
    versions = [other for other in known if other.rpartition("-")[0] == name]
    latest = max(versions, key=lambda other: int(other.rpartition("-")[2]), default=name)
    found: Battery = get("battery", latest)
    return found
