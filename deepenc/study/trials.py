"""One trial: a defense of the space, under its attacks from cheap to expensive, on tuning data alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from deepenc.arena.build import Encryption, Subject, fresh
from deepenc.arena.duel import run_duel
from deepenc.arena.estimates.estimate import Estimate, estimated
from deepenc.arena.estimates.references import References, Row, by_key, table
from deepenc.arena.estimates.summaries import worst
from deepenc.arena.plan import Cell, Duel, plan
from deepenc.arena.record import Record
from deepenc.arena.run.matrix import device_of
from deepenc.encryption.defense import Defense
from deepenc.encryption.response.objective import response_change
from deepenc.errors import ConfigError
from deepenc.seeds import Roots
from deepenc.study.search import Objective, Search
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim

RESPONSE_IMAGES = 256
"""Images of the judge, or held out in his place, on which the response change of Equation 1 is measured."""

Report = Callable[[int, float], bool]
"""Is told a step and the objective so far, of a single one; says whether to give up."""


@dataclass(frozen=True)
class Result:
    """How a trial ended.

    Attributes:
        state: Told apart strictly: what breaks has failed; what is given up, or costs more memory than is
            allowed, is pruned.
        values: One for each objective, where complete.
        reason: Why it is not complete.
        records: The duels that were fought.
        responses: Response change per key, where an objective asks for it.
    """

    state: Literal["complete", "pruned", "failed"]
    values: tuple[float, ...] = ()
    reason: str = ""
    records: tuple[Record, ...] = ()
    responses: tuple[float, ...] = ()


class Evaluator:
    """Fights trials; made once per process.

    Args:
        search: What is searched.
        cache: Folder of the victims.
        root: Root of the tuning keys and seeds.
    """

    def __init__(self, search: Search, cache: Path, root: Roots) -> None:
        self._search, self._root = search, root
        self._whole = Subject.of(validated(search.victim.load(cache)))
        self._subject = Subject(tuning_part(self._whole.victim, search.held_out), self._whole.sites)
        self._device = device_of(search.experiment(search.base))
        self._encryptions: dict[int, Encryption] = {}
        self.references: tuple[Record, ...] = ()

    def measure_references(self) -> tuple[Record, ...]:
        """Fight the null defense: the stolen original, and training from scratch, once per key.

        Raises:
            ConfigError: One of them could not be measured.
        """
        null = Defense.of("null")
        cells = [c for c in plan(self._search.experiment(self._search.base)) if not c.defense.protects]
        secret = bytes(32)  # there is nothing to hide
        made = Encryption.of(self._subject, null, secret)
        records = []
        for cell in cells:
            record = run_duel(self._duel(cell), lambda: made)
            if record.state == "failed":
                raise ConfigError(
                    f"the reference {cell.entry.label!r} could not be measured: {record.reason}"
                )
            records.append(record)
        self.references = tuple(records)
        return self.references

    def run(self, values: Mapping[str, Any], report: Report) -> Result:
        """Fight one trial.

        Args:
            values: Of all parameters of the space.
            report: Is told how it goes.
        """
        self._encryptions.clear()
        records: list[Record] = []
        try:
            return self._run(self._search.variant(values), records, report)
        except Exception:  # whatever a setting makes a plugin raise is that trial's end, not the study's
            return Result("failed", reason=traceback.format_exc(), records=tuple(records))
        finally:
            self._encryptions.clear()

    def _run(self, defense: Defense, records: list[Record], report: Report) -> Result:
        search = self._search
        cells = ordered(search, defense)
        over = self._memory(defense, cells[0]) if search.memory is not None else 0.0
        if search.memory is not None and over > search.memory:
            reason = f"costs {over:.2%} of memory, more than the {search.memory:.2%} allowed"
            return Result("pruned", reason=reason)
        responses: list[float] = []
        for step, cell in enumerate(cells):
            duel = self._duel(cell)
            record = run_duel(duel, lambda cell=cell, duel=duel: self._encryption(cell, duel.secret))  # type: ignore[misc]
            records.append(record)
            if record.state != "done":
                return Result("failed", reason=f"{cell.entry.label}: {record.reason}", records=tuple(records))
            if "gain" in search.objectives and len(responses) <= cell.key:
                responses.append(self._response(self._encryption(cell, duel.secret)))
            if len(search.objectives) == 1 and step + 1 < len(cells):
                so_far = values_of(search, (*self.references, *records), responses)[0]
                if so_far is not None and report(step, so_far.mean):
                    reason = f"given up after {step + 1} of {len(cells)} duels"
                    return Result("pruned", reason=reason, records=tuple(records))
        found = values_of(search, (*self.references, *records), responses)
        missing = [o for o, value in zip(search.objectives, found, strict=True) if value is None]
        if missing:
            return Result("failed", reason=_unmeasured(missing), records=tuple(records))
        means = tuple(value.mean for value in found if value is not None)
        return Result("complete", means, records=tuple(records), responses=tuple(responses))

    def _duel(self, cell: Cell) -> Duel:
        fingerprint = self._subject.victim.fingerprint
        return Duel.of(cell, fingerprint, self._root, self._search.judge, self._device)

    def _encryption(self, cell: Cell, secret: bytes) -> Encryption:
        if cell.key not in self._encryptions:
            self._encryptions[cell.key] = Encryption.of(self._subject, cell.defense, secret)
        return self._encryptions[cell.key]

    def _memory(self, defense: Defense, cell: Cell) -> float:
        """Memory of a defense; hardening, which is expensive, does not change it."""
        bare = defense.model_copy(update={"hardening": ()})
        return Encryption.of(self._subject, bare, self._duel(cell).secret).memory

    def fresh_responses(self, defense: Defense, secrets: Sequence[bytes]) -> list[float]:
        """Response change under further keys, on the judge's own images; for after the search alone."""
        if not defense.protects or "gain" not in self._search.objectives:
            return []
        return [self._response(Encryption.of(self._whole, defense, secret)) for secret in secrets]

    def _response(self, encryption: Encryption) -> float:
        measure, key = self._search.measure, encryption.key
        if key.arrangement and measure.startswith("features"):
            raise ConfigError(
                f"the measure {measure!r} compares channels in their order, and the defense arranges them "
                "otherwise; measure logits or probabilities"
            )
        victim, network = encryption.subject.victim, fresh(encryption, torch.device("cpu"))
        inputs = victim.judge[:RESPONSE_IMAGES].inputs
        layout, task = key.layout(), victim.task
        found = response_change(victim.model, network, inputs, measure=measure, layout=layout, task=task)
        return float(getattr(found, self._search.form))


def tuning_part(victim: Victim, held_out: float) -> Victim:
    """A victim whose judge holds a share of the defender's images, and the defender the rest.

    The judge's own images are in no part of it.

    Raises:
        ConfigError: The defender has too few images to share.
    """
    count = len(victim.defender)
    held = round(held_out * count)
    if not 0 < held < count:
        raise ConfigError(
            f"held_out: a share of {held_out} of the defender's {count} images leaves one side with none"
        )
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    return replace(
        victim,
        defender=victim.defender[order[held:]],
        judge=victim.defender[order[:held]],
        fingerprint=f"{victim.fingerprint} tuning {held_out}",
    )


def ordered(search: Search, defense: Defense) -> list[Cell]:
    """The duels of a trial: the references first, then attack by attack as listed, each under all keys."""
    places = {entry.label: place for place, entry in enumerate(search.attacks) if not entry.attack.reference}
    cells = [cell for cell in plan(search.experiment(defense)) if cell.defense.protects]
    return sorted(cells, key=lambda cell: (places.get(cell.entry.label, -1), cell.key))


def values_of(
    search: Search, records: Sequence[Record], responses: Sequence[float] = ()
) -> list[Estimate | None]:
    """The objectives of one defense, over the keys fought so far.

    Args:
        search: Names the objectives.
        records: Duels with one protecting defense, and the references.
        responses: Response change per key.

    Returns:
        For each objective None where it was not measured.
    """
    references = References(records)
    own = [record for record in records if record.protected and record.state == "done"]
    memory, _ = by_key(own, lambda record: record.memory)
    secret, _ = by_key(own, lambda record: record.secret_bytes)
    # One formula for all that is a mean over examples: what each of them lost, and that for the memory spent.
    lost, damaged = by_key(own, partial(_damage, references))
    losses = table(damaged, references.damage)
    per_memory, priced = by_key([r for r in own if r.memory], partial(_ratio, references))
    suspected: dict[int, float] = {}
    for record in own:
        if record.detection is not None:
            suspected[record.key] = max(record.detection.auc, suspected.get(record.key, 0.0))
    gains = {key: r - (search.lam or 0.0) * memory[key] for key, r in enumerate(responses) if key in memory}
    measured: dict[Objective, Estimate | None] = {
        "damage": estimated(lost, "free", table=losses),
        "memory": estimated(memory, "free"),
        "secret": estimated(secret, "free"),
        "detectability": estimated(suspected),
        "damage-per-memory": estimated(per_memory, "free", table=table(priced, partial(_ratios, references))),
        "gain": estimated(gains, "free"),
        "worst-advantage": None,
    }
    advantages = [w.advantage for w in worst(records) if w.advantage is not None]
    if advantages:
        measured["worst-advantage"] = max(advantages, key=lambda advantage: advantage.mean)
    return [measured[objective] for objective in search.objectives]


def _damage(references: References, record: Record) -> float | None:
    """Share of the score that a release lost, as it is; None for other records."""
    original = references.rate("floor", record)
    if record.reference != "floor" or record.score is None or original is None:
        return None
    return original - record.score.value


def _ratio(references: References, record: Record) -> float | None:
    damage = _damage(references, record)
    return damage / record.memory if damage is not None and record.memory else None


def _ratios(references: References, record: Record) -> Row | None:
    damage = references.damage(record)
    return damage / record.memory if damage is not None and record.memory else None


def _unmeasured(missing: Sequence[Objective]) -> str:
    remedies = {
        "worst-advantage": "training from scratch is as good as the original; give the threat fewer images",
        "detectability": "no attack claims scores; list one that does, such as norms",
    }
    return "; ".join(f"{o} was not measured: {remedies.get(o, 'no duel gave it')}" for o in missing)
