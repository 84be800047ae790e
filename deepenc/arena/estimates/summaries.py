"""Many records in few numbers: each with its count, its interval, and the unit that the interval is over."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from deepenc.arena.estimates.estimate import Estimate, estimated
from deepenc.arena.estimates.references import References, by_key, table
from deepenc.arena.estimates.sampled import Scale
from deepenc.arena.record import Cost, Detection, Record

Group = tuple[str, str, str, str]
"""Victim, defense, threat, attack: what a line of a table is about."""

Place = tuple[str, str, str]
"""Victim, defense, threat."""


@dataclass(frozen=True)
class Layers:
    """How often sites were found exactly, over several keys of one network: the paper's P = p^L, measured.

    The paper reckons that a network of L layers is decrypted with probability P = p^L, where each layer's key
    is found with probability p, independently (Section 4).

    Attributes:
        mean: Mean share of the sites found; the paper's p.
        product: What P would be if sites were found independently: the product of each site's share of keys
            for which it was found, 0 where a site was never found.
        joint: Share of the keys for which all sites were found: what P was.
    """

    mean: float
    product: float
    joint: float


@dataclass(frozen=True)
class DetectionSummary:
    """Means over keys of what `Detection` measures; ``exact`` is the share of sites found exactly.

    Where less is worse for the owner (``bits_left``), the worst key is the one with the ``least``. ``layers``
    sets the paper's p^L beside how often all sites were found.
    """

    auc: Estimate
    average_precision: Estimate
    tpr: Estimate
    exact: Estimate
    bits_left: Estimate
    bits: float
    layers: Layers


@dataclass(frozen=True)
class CostSummary:
    """Mean cost of a duel."""

    samples: float
    steps: float
    queries: float
    trials: float
    seconds: float


@dataclass(frozen=True)
class CellSummary:
    """One attack on one defense of one victim under one threat model, over all keys and repeats.

    Attributes:
        states: How many duels ended how.
        reason: Why the first duel that is not done did not end so; None where all are.
        score: The task's primary measure, in [0, 1]; None where none was measured.
        measure: Its name.
        advantage: Gain over training from scratch, 0 to 1 and beyond; None without both references.
        detection: None where no scores were claimed.
        cost: None where no duel was fought to its end.
        memory: Mean measured ΔMem / Mem.
        key_bits: Mean entropy of the keys.
        secret_bytes: Mean bytes that the owner keeps, see `Record`.
        removed: Whether the arena removed the most suspect channels itself.
        unreliable: Why the attack failed its self-test; None where it passed.
        diverged: How many duels ran into numbers that are not finite, and went back.
        further: Means of the task's further measures, by name.
    """

    victim: str
    defense: str
    threat: str
    attack: str
    reference: Literal["floor", "scratch"] | None
    protected: bool
    states: Mapping[str, int]
    reason: str | None
    score: Estimate | None
    advantage: Estimate | None
    detection: DetectionSummary | None
    cost: CostSummary | None
    memory: float | None
    key_bits: float | None
    removed: bool
    secret_bytes: float | None = None
    unreliable: str | None = None
    diverged: int = 0
    measure: str = "accuracy"
    further: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        """What the summary is about."""
        return self.victim, self.defense, self.threat, self.attack


@dataclass(frozen=True)
class WorstSummary:
    """The strongest attack of every key, then over keys: what an owner must reckon with.

    Attributes:
        attacks: How many keys fell worst to which attack.
        missing: Duels that did not end "done": attacks whose success is not known.
        score: Over keys, of the strongest attack on each.
        advantage: The same, as advantage.
    """

    victim: str
    defense: str
    threat: str
    attacks: Mapping[str, int]
    missing: int
    score: Estimate
    advantage: Estimate | None


def summarise(records: Sequence[Record]) -> list[CellSummary]:
    """One summary per victim, defense, threat and attack, in the order in which they first appear."""
    references = References(records)
    groups: dict[Group, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.victim, record.defense, record.threat, record.attack].append(record)
    return [_summary(group, members, references) for group, members in groups.items()]


def _summary(group: Group, records: list[Record], references: References) -> CellSummary:
    victim, defense, threat, attack = group
    first = records[0]
    done = [record for record in records if record.state == "done"]
    return CellSummary(
        victim=victim,
        defense=defense,
        threat=threat,
        attack=attack,
        reference=first.reference,
        protected=first.protected,
        states=dict(Counter(record.state for record in records)),
        reason=next((r.reason for r in records if r.state != "done"), None),
        score=_score(done),
        advantage=references.advantages(records),
        detection=_detection(done),
        cost=_cost(records),
        memory=_mean(r.memory for r in records),
        key_bits=_mean(r.key_bits for r in records),
        secret_bytes=_mean(r.secret_bytes for r in records),
        removed=any(r.removed for r in records),
        unreliable=next((r.unreliable for r in records if r.unreliable), None),
        diverged=sum(r.diverged for r in records),
        measure=next((r.score.measure for r in records if r.score), "accuracy"),
        further=_further(done),
    )


def worst(records: Sequence[Record]) -> list[WorstSummary]:
    """The strongest attack per key, then summarised, for every protecting defense and threat.

    Attacks that use nothing of the encrypted network (``reference == "scratch"``) do not count, nor do keys
    that some attack was not run on, where others met them all: they would look safer than they are.
    """
    references = References(records)
    missing: Counter[Place] = Counter()
    for record in records:
        missing[record.victim, record.defense, record.threat] += record.state != "done" and _counts(record)
    summaries = []
    for (victim, defense, threat), members in strongest(records).items():
        score = _score(members)
        assert score is not None
        summaries.append(
            WorstSummary(
                victim=victim,
                defense=defense,
                threat=threat,
                attacks=dict(Counter(r.attack for r in members)),
                missing=missing[victim, defense, threat],
                score=score,
                advantage=references.advantages(members),
            )
        )
    return summaries


def strongest(records: Iterable[Record]) -> dict[Place, list[Record]]:
    """The strongest attack's record on each key, as `worst` counts them, by victim, defense and threat."""
    groups: dict[Place, list[Record]] = defaultdict(list)
    for record in records:
        if _counts(record):
            groups[record.victim, record.defense, record.threat].append(record)
    found = {place: _strongest(_complete(members)) for place, members in groups.items()}
    return {place: members for place, members in found.items() if members}


def _counts(record: Record) -> bool:
    return record.protected and record.reference != "scratch"


def _complete(records: Sequence[Record]) -> list[Record]:
    """The records of the keys that met as many attacks as any did."""
    met: dict[int, set[str]] = defaultdict(set)
    for record in records:
        met[record.key].add(record.attack)
    most = max(len(attacks) for attacks in met.values())
    return [record for record in records if len(met[record.key]) == most]


def _strongest(records: Iterable[Record]) -> list[Record]:
    best: dict[int, Record] = {}
    for record in records:
        if record.state == "done" and record.score is not None:
            known = best.get(record.key)
            if known is None or known.score is None or record.score.value > known.score.value:
                best[record.key] = record
    return list(best.values())


def _score(records: Sequence[Record]) -> Estimate | None:
    values, members = by_key(records, lambda r: r.score.value if r.score else None)
    examples = [r.score.examples for r in records if r.score]
    return estimated(values, table=table(members), examples=min(examples, default=None))


def _over_keys(
    records: Iterable[Record], measure: Callable[[Record], float | None], scale: Scale = "share"
) -> Estimate | None:
    """Of a measure that is one number a key, and no mean over examples."""
    return estimated(by_key(records, measure)[0], scale)


def _further(records: Sequence[Record]) -> dict[str, Estimate]:
    found = {name: None for r in records if r.score for name in r.score.further}
    means = {}
    for name in found:

        def measure(record: Record, name: str = name) -> float | None:
            return record.score.further.get(name) if record.score else None

        shares = all(0 <= (measure(record) or 0) <= 1 for record in records)
        means[name] = _over_keys(records, measure, "share" if shares else "free")
    return {name: mean for name, mean in means.items() if mean is not None}


def _detection(records: Sequence[Record]) -> DetectionSummary | None:
    found = [r for r in records if r.detection is not None]

    def over(measure: Callable[[Any], float], scale: Scale = "share") -> Estimate:
        estimate = _over_keys(found, lambda record: measure(record.detection), scale)
        assert estimate is not None
        return estimate

    if not found:
        return None
    return DetectionSummary(
        auc=over(lambda d: d.auc),
        average_precision=over(lambda d: d.average_precision),
        tpr=over(lambda d: d.tpr),
        exact=over(lambda d: d.exact_sites / d.sites),
        bits_left=over(lambda d: d.bits_left, "free"),
        bits=over(lambda d: d.bits, "free").mean,
        layers=per_layer([r.detection for r in found if r.detection]),
    )


def _cost(records: Sequence[Record]) -> CostSummary | None:
    costs = [r.cost for r in records if r.state == "done" and r.cost is not None]
    if not costs:
        return None
    fields = Cost.model_fields
    return CostSummary(**{name: float(np.mean([getattr(c, name) for c in costs])) for name in fields})


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def per_layer(detections: Sequence[Detection]) -> Layers:
    """Success by site.

    Args:
        detections: One for each key, at least one, all of the same sites.
    """
    keys, sites = len(detections), detections[0].sites
    found = Counter(name for detection in detections for name in detection.found)
    missed = len(found) < sites
    return Layers(
        mean=sum(found.values()) / (keys * sites),
        product=0.0 if missed else math.prod(count / keys for count in found.values()),
        joint=sum(len(detection.found) == sites for detection in detections) / keys,
    )
