"""What is searched: a space of defenses, what judges them, and how long; read from YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepenc.arena.entry import Entry
from deepenc.arena.kit.space import Axis, Space, value_of, varied
from deepenc.arena.plan import Experiment
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.encryption.response.measure import Measure
from deepenc.encryption.response.objective import Form
from deepenc.errors import ConfigError, DeepencError
from deepenc.victims.victim import VictimSource

Objective = Literal[
    "damage-per-memory", "gain", "worst-advantage", "damage", "memory", "secret", "detectability"
]
RISING: frozenset[Objective] = frozenset({"damage-per-memory", "gain", "damage"})
"""Objectives of which more is better; of the others less is."""
CHANGEABLE = {"trials", "fresh_keys", "against", "workers", "finalists", "pruning"}
"""Fields that may change between two commands on one study."""


class Search(BaseModel):
    """A search for the best configuration of a defense.

    Attributes:
        name: Name of the run's folder, and of the defense that is looked for.
        victim: Network and data.
        base: The defense whose parameters are searched; the first trial, where the space holds it.
        space: Parameters of the defense, with dots (``weights.norm_source``), to choices or ranges. A whole
            plugin is chosen by its line of text (``weights: [samp, init]``), a hardening by lines joined with
            ``+`` or null for none. An entry of a mapping stands in brackets:
            ``placement.counts[layer1.0.conv1]``. A parameter that the chosen plugin does not have is
            left out.
        attacks: Attacks, from cheap to expensive.
        threats: Threat models.
        objectives: What to reach: several make a front of compromises. ``damage-per-memory``: points of
            accuracy lost per percent of memory; ``gain``: Equation 1 with ``lam``; ``worst-advantage``: of
            the strongest attack per key; ``damage``: share of accuracy lost; ``memory``: ΔMem / Mem;
            ``secret``: bytes that the owner keeps; ``detectability``: the largest AUC of an attack's scores
            per key.
        lam: λ of Equation 1, for ``gain``.
        measure: What Equation 1 compares, for ``gain``: ``logits``, ``probabilities``, ``features``, or
            ``features:NAME`` of a layer.
        form: Which number of the response counts, for ``gain``: ``l2``, or ``relative``.
        memory: Largest ΔMem / Mem; what costs more is not fought.
        trials: Trials in all, those of earlier commands included.
        keys: Tuning keys.
        fresh_keys: Keys on which the winner is measured again.
        against: Defenses measured beside the winner.
        held_out: Share of the defender's images that stand in for the judge's during the search.
        judge: Images to judge by at most; default: all.
        workers: Processes.
        finalists: With several objectives, points of the front that are measured again at most.
        pruning: With one objective, whether trials that are worse than the median half-way are given up.
        seed: Root of keys and seeds; leave it out, and the study draws its own.
        device: As in an experiment.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    victim: VictimSource
    base: Defense = Field(default_factory=lambda: Defense.of("paper-samp"))
    space: Space = Field(min_length=1)
    attacks: tuple[Entry, ...] = ()
    threats: tuple[Threat, ...] = Field((Threat(name="thief"),), min_length=1)
    objectives: tuple[Objective, ...] = Field(min_length=1)
    lam: float | None = Field(None, ge=0, allow_inf_nan=False)
    measure: Measure = "logits"
    form: Form = "l2"
    memory: float | None = Field(None, gt=0, allow_inf_nan=False)
    trials: int = Field(30, ge=1)
    keys: int = Field(2, ge=1)
    fresh_keys: int = Field(5, ge=1)
    against: tuple[Defense, ...] = Field(default_factory=lambda: (Defense.of("paper-samp"),))
    held_out: float = Field(0.5, gt=0, lt=1)
    judge: int | None = Field(None, ge=1)
    workers: int = Field(1, ge=1)
    finalists: int = Field(5, ge=1)
    pruning: bool = True
    seed: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.base.protects:
            raise ConfigError("expected a defense with a placement and weights, got one without", ("base",))
        if self.name in {"null", *(d.name for d in self.against)}:
            raise ConfigError(f"{self.name!r} is that of another defense; choose one of its own", ("name",))
        self._objectives_agree()
        self._space_fits()
        self.experiment(self.base)
        for index, entry in enumerate(self.attacks):
            missing = [m for t in self.threats for p in entry.meets(t) for m in entry.attack.needs.missing(p)]
            if missing:
                raise ConfigError(
                    f"attack {entry.label!r} needs what a threat model does not give: "
                    f"{', '.join(dict.fromkeys(missing))}; give it, or name the attack's `threats`",
                    ("attacks", index),
                )
        return self

    def _objectives_agree(self) -> None:
        place = ("objectives",)
        asked = set(self.objectives)
        aims = asked - {"memory", "secret", "detectability"}
        if len(asked) < len(self.objectives):
            raise ConfigError("one is listed twice", place)
        if not aims:
            raise ConfigError(
                f"{', '.join(sorted(asked))} is reached by inserting next to nothing; add damage or "
                "worst-advantage",
                place,
            )
        if (ratios := asked & {"damage-per-memory", "gain"}) and (
            rivals := asked & {"damage", "memory"} or ratios - {min(ratios)}
        ):
            raise ConfigError(
                f"{min(ratios)} weighs damage against memory already, which contradicts {min(rivals)} beside "
                "it; list one or the other",
                place,
            )
        if aims & {"damage", "worst-advantage"} and self.memory is None and "memory" not in asked:
            raise ConfigError(
                f"{min(aims)} alone asks for all the memory there is; give a bound, as in `memory: 0.05`, or "
                "list memory as an objective, too",
                place,
            )
        if "gain" in asked and self.lam is None:
            raise ConfigError("the objective gain needs `lam`, its price of memory", place)
        theirs = type(self).model_fields
        for field in () if "gain" in asked else ("lam", "measure", "form"):
            if getattr(self, field) != theirs[field].default:
                raise ConfigError(
                    f"{field} is for the objective gain, which is not asked for; leave it out", (field,)
                )
        if asked & {"worst-advantage", "detectability"} and all(e.attack.reference for e in self.attacks):
            raise ConfigError("worst-advantage and detectability need attacks; list some", place)

    def _space_fits(self) -> None:
        fields = [axis.field for axis in self.space]
        holders = [self.base, *self._whole()]
        for index, axis in enumerate(self.space):
            place = ("space", index)
            if axis.field in fields[:index]:
                raise ConfigError(f"{axis.field!r} is listed twice", place)
            if axis.field == "name":
                raise ConfigError("the name of a defense changes nothing; leave it out", place)
            for value in axis.ends():
                complaints = [said for holder in holders if (said := _refusal(holder, axis.field, value))]
                if len(complaints) == len(holders):
                    hint = next((said for said in complaints if "did you mean" in said), complaints[0])
                    raise ConfigError(hint, place)

    def _whole(self) -> list[Defense]:
        """The base with each whole plugin of the space in its place, one at a time."""
        found = []
        for axis in self.space:
            for choice in axis.choices:
                if "." not in axis.field and not _refusal(self.base, axis.field, choice):
                    found.append(_set(self.base, axis.field, choice))
        return found

    def variant(self, values: Mapping[str, Any], name: str | None = None) -> Defense:
        """The defense of a trial.

        Args:
            values: Parameter to value, all of the space.
            name: How tables call it; default: the search's name.

        Raises:
            ConfigError: The values do not go together.
        """
        defense = self.base.model_copy(update={"name": name or self.name, "summary": ""})
        try:
            # Whole plugins first: the parameters are then theirs.
            for field in sorted(values, key=lambda field: field.count(".")):
                if _has(defense, field):
                    defense = _set(defense, field, values[field])
        except (ValueError, DeepencError) as error:
            raise ConfigError(f"no defense has {dict(values)}: {error}") from error
        return defense

    def start(self) -> dict[str, Any] | None:
        """The base's own values; None where the space does not hold them."""
        found: dict[str, Any] = {}
        for axis in self.space:
            if not _has(self.base, axis.field):  # left out, so that any value will do
                found[axis.field] = axis.ends()[0]
                continue
            candidates = axis.choices or (_get(self.base, axis.field),)
            for value in candidates:
                same = not _refusal(self.base, axis.field, value) and axis.holds(value)
                if same and _set(self.base, axis.field, value) == self.base:
                    found[axis.field] = value
                    break
        return found if len(found) == len(self.space) else None

    def experiment(self, *defenses: Defense, **changes: Any) -> Experiment:
        """The duels that defenses are judged by."""
        null = Entry.model_validate("null")
        fields: dict[str, Any] = {
            "name": self.name,
            "victims": (self.victim,),
            "defenses": defenses,
            "attacks": self.attacks or (null,),
            "threats": self.threats,
            "keys": self.keys,
            "judge": self.judge,
            "device": self.device,
        }
        return Experiment(**fields | changes)

    def identity(self) -> dict[str, Any]:
        """What a study's trials have in common, as plain data; a study of another is another study."""
        experiment = self.experiment(self.base).spec()
        own = {
            "victim": self.victim.spec(),
            "base": self.base.spec(),
            "space": [axis.model_dump(mode="json") for axis in self.space],
            "attacks": experiment["attacks"],
            "threats": experiment["threats"],
        }
        rest = type(self).model_fields.keys() - CHANGEABLE - own.keys()
        whole = own | {field: getattr(self, field) for field in sorted(rest)}
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain


def _split(field: str) -> tuple[str, str | None]:
    """A path, and the entry of a mapping that it ends with, if any."""
    path, bracket, entry = field.partition("[")
    return path, entry.removesuffix("]") if bracket else None


def _get(defense: Defense, field: str) -> Any:
    path, entry = _split(field)
    try:
        value = value_of(defense, path)
        return value if entry is None else dict(value or ()).get(entry)
    except (ValueError, TypeError):
        return None


def _has(defense: Defense, field: str) -> bool:
    try:
        value_of(defense, _split(field)[0])
    except ValueError:
        return False
    return True


def _set(defense: Defense, field: str, value: Any) -> Defense:
    path, entry = _split(field)
    if entry is not None:
        value = dict(value_of(defense, path) or ()) | {entry: value}
    elif path == "hardening":
        value = tuple(step.strip() for step in value.split("+")) if value else ()
    return cast(Defense, varied(cast(Any, defense), {path: value}))


def _refusal(defense: Defense, field: str, value: Any) -> str | None:
    """Why a defense does not take a value; None where it does."""
    try:
        _set(defense, field, value)
    except (ValueError, TypeError, DeepencError) as error:
        return str(error)
    return None


def size(space: tuple[Axis, ...]) -> int | None:
    """How many points a space has; None where it has no end of them."""
    total = 1
    for axis in space:
        if axis.choices:
            total *= len(axis.choices)
        elif isinstance(axis.low, int) and isinstance(axis.high, int):
            total *= axis.high - axis.low + 1
        elif axis.low != axis.high:
            return None
    return total
