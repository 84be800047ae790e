"""What a run consists of: the experiment, and the cells of its matrix."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepenc.arena.battery import battery
from deepenc.arena.entry import Entry
from deepenc.arena.provenance import code_version, core_version
from deepenc.arena.record import Record
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, PluginError
from deepenc.plugins import get, names, parts_of
from deepenc.seeds import Roots, derive, number
from deepenc.victims.victim import VictimSource

log = logging.getLogger(__name__)


class Experiment(BaseModel):
    """Attack against defense: every combination of what is listed.

    The references are added by themselves: the null defense against the attacks that are references.

    Attributes:
        name: Name of the run's folder.
        victims: Networks and data.
        defenses: Defenses, by name or as mappings.
        attacks: Attacks, by name or as mappings; or the name of a battery.
        threats: Threat models; default: those of the battery.
        battery: The battery, where one was named.
        keys: Keys per defense; a number without a second key has no interval.
        repeats: Attack seeds per key.
        seed: Root of all keys. Leave it out, and each run draws its own: whoever guesses the seed has the
            keys. Give one only to repeat a run exactly; the attackers' seeds are then always the same.
        judge: Judge's images to use at most; default: all.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    victims: tuple[VictimSource, ...] = Field(min_length=1)
    defenses: tuple[Defense, ...] = Field(min_length=1)
    attacks: tuple[Entry, ...] = Field(min_length=1)
    threats: tuple[Threat, ...] = Field(min_length=1)
    battery: str | None = None
    keys: int = Field(3, ge=1)
    repeats: int = Field(1, ge=1)
    seed: int | None = None
    judge: int | None = Field(None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _from_battery(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("attacks"), str):
            return data
        try:
            found = battery(data["attacks"])
        except PluginError as error:
            raise ConfigError(f"{error}; or list attacks", ("attacks",)) from error
        given = {"threats": found.threats} | dict(data)
        return given | {"attacks": found.attacks, "battery": found.name}

    @model_validator(mode="after")
    def _labels_distinct(self) -> Self:
        for what, labels in (
            ("victims", [v.label for v in self.victims]),
            ("defenses", [d.name for d in self.defenses]),
            ("threats", [t.name for t in self.threats]),
            ("attacks", [e.label for e in self.attacks]),
        ):
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                said = f"{', '.join(map(repr, twice))} listed twice; give each its own name or label"
                raise ConfigError(said, (what,))
        threats, victims = {t.name for t in self.threats}, {v.label for v in self.victims}
        for entry in self.attacks:
            _all_known(entry, "threats", entry.threats, threats)
            _all_known(entry, "victims", entry.victims, victims)
        return self

    def spec(self) -> dict[str, Any]:
        """The experiment as plain data, from which an equal one can be made."""
        return {
            "name": self.name,
            "victims": [v.spec() for v in self.victims],
            "defenses": [d.spec() for d in self.defenses],
            "attacks": [
                {"attack": e.attack.spec()} | e.model_dump(mode="json", exclude={"attack"})
                for e in self.attacks
            ],
            "threats": [t.model_dump() for t in self.threats],
            "battery": self.battery,
            "keys": self.keys,
            "repeats": self.repeats,
            "seed": self.seed,
            "judge": self.judge,
            "device": self.device,
        }


def _all_known(entry: Entry, what: str, named: tuple[str, ...] | None, known: set[str]) -> None:
    if strangers := sorted(set(named or ()) - known):
        raise ConfigError(
            f"attack {entry.label!r} names {what} {strangers}; known: {sorted(known)}", ("attacks",)
        )


@dataclass(frozen=True)
class Cell:
    """One duel to be fought: a place in the matrix.

    Attributes:
        victim: Where the network and the data come from.
        defense: The defense.
        entry: The attack, with its label.
        threat: The threat model.
        key: Index of the key, from 0.
        repeat: Index of the attack seed, from 0.
    """

    victim: VictimSource
    defense: Defense
    entry: Entry
    threat: Threat
    key: int
    repeat: int

    def identity(self, victim_fingerprint: str, roots: Roots, judge: int | None, device: str) -> str:
        """Hash of all that the result depends on.

        Args:
            victim_fingerprint: Of the victim's weights and data.
            roots: The run's, from which keys and seeds are derived.
            judge: Judge's images at most.
            device: ``"cpu"`` or ``"cuda"``.
        """
        plugins = (*parts_of(self.entry.attack), *parts_of(self.defense), self.victim)
        content = {
            "victim": [self.victim.spec(), victim_fingerprint],
            "defense": self.defense.spec(),
            "attack": [self.entry.label, self.entry.attack.spec()],
            "threat": self.threat.model_dump(),
            "code": [core_version(), *(code_version(plugin) for plugin in plugins)],
            "key": self.key,
            "repeat": self.repeat,
            "secret": hashlib.sha256(self.secret(roots)).hexdigest(),
            "seeds": [self.attack_seed(roots), hashlib.sha256(b"%d" % self.leak_seed(roots)).hexdigest()],
            "judge": judge,
            "device": device,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def secret(self, roots: Roots) -> bytes:
        """The defender's 32-byte secret; nothing in a case leads back to it."""
        return derive(roots.defender, "secret", self.victim.spec(), self.defense.spec(), self.key)

    def attack_seed(self, roots: Roots) -> int:
        """The attacker's seed, the same against every defense, in [0, 2**63)."""
        return number(derive(roots.attackers, "attack", *self._place()))

    def leak_seed(self, roots: Roots) -> int:
        """Chooses which positions leak to a partly informed attacker, in [0, 2**63).

        It is not the attacker's seed: knowing which of the positions leaked, counted from the first, would
        tell more than the positions themselves.
        """
        return number(derive(roots.defender, "leak", *self._place()))

    def _place(self) -> list[Any]:
        return [self.victim.spec(), self.threat.family, self.key, self.repeat]


@dataclass(frozen=True)
class Duel:
    """A cell with all that fighting it needs; plain data, for another process too.

    Attributes:
        cell: The place in the matrix.
        identity: Of the cell.
        secret: The defender's secret; cells that share it share the encryption.
        seed: The attacker's seed.
        leak_seed: Draws the positions that leak.
        judge: Judge's images at most; None is all.
        device: ``"cpu"`` or ``"cuda"``.
    """

    cell: Cell
    identity: str
    secret: bytes = field(repr=False)
    seed: int
    leak_seed: int
    judge: int | None
    device: str

    @classmethod
    def of(cls, cell: Cell, fingerprint: str, roots: Roots, judge: int | None, device: str) -> Duel:
        """Derive everything from the run's roots; ``fingerprint`` is the victim's."""
        return cls(
            cell,
            cell.identity(fingerprint, roots, judge, device),
            cell.secret(roots),
            cell.attack_seed(roots),
            cell.leak_seed(roots),
            judge,
            device,
        )

    def record(self, **measured: Any) -> Record:
        """The record of this cell, with what was measured."""
        cell = self.cell
        return Record(
            cell=self.identity,
            victim=cell.victim.label,
            defense=cell.defense.name,
            attack=cell.entry.label,
            threat=cell.threat.name,
            key=cell.key,
            repeat=cell.repeat,
            reference=cell.entry.attack.reference,
            protected=cell.defense.protects,
            **measured,
        )


def plan(experiment: Experiment) -> list[Cell]:
    """All cells of an experiment, references included; cells that share an encryption are neighbours."""
    return list(dict.fromkeys(_cells(experiment)))


def _cells(experiment: Experiment) -> Iterator[Cell]:
    null = Defense.model_validate("null")
    defenses = {null.name: null} | {d.name: d for d in experiment.defenses}
    wanted = {d.name for d in experiment.defenses}
    bouts = _bouts(experiment)
    for victim in experiment.victims:
        for defense in defenses.values():
            fought = [(e, t) for e, t in bouts if _meets(e, defense, listed=defense.name in wanted)]
            for key in range(experiment.keys):
                for entry, threat in fought:
                    if entry.victims is not None and victim.label not in entry.victims:
                        continue
                    if key < (entry.keys or experiment.keys):
                        for repeat in range(experiment.repeats):
                            yield Cell(victim, defense, entry, threat, key, repeat)


def _bouts(experiment: Experiment) -> list[tuple[Entry, Threat]]:
    """Attacks with the threat models they meet, the references at every point of a curve among them."""
    entries = (*_missing_references(experiment), *experiment.attacks)
    references = [entry for entry in entries if entry.attack.reference and entry.curve is None]
    bouts = []
    for threat in experiment.threats:
        points = {
            point.name: point
            for entry in entries
            for point in entry.meets(threat)
            if entry.curve is not None and not entry.attack.reference
        }
        plain = [(entry, point) for entry in entries for point in entry.meets(threat)]
        bouts += [*plain, *((entry, point) for point in points.values() for entry in references)]
    return bouts


def _missing_references(experiment: Experiment) -> list[Entry]:
    listed = {entry.attack.name for entry in experiment.attacks}
    missing = []
    for name in sorted(set(names("attack")) - listed):
        try:
            if get("attack", name).reference:
                missing.append(Entry.model_validate(name))
        except PluginError as error:  # somebody's broken plugin that this experiment does not name
            log.warning("left out: %s", error)
    return missing


def _meets(entry: Entry, defense: Defense, *, listed: bool) -> bool:
    """Whether an attack is fought against a defense.

    References meet the null defense even where it is not listed. An attack from scratch uses nothing of the
    encrypted network, so that it would do the same against every defense: it meets the null defense only.
    """
    if not defense.protects:
        return listed or entry.attack.reference is not None
    return entry.attack.reference != "scratch"
