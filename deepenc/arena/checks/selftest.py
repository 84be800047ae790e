"""What an attack must show before its failures count for a defense.

An attack that fails on a planted weakness that it promises to see, does worse there the more it may spend, or
sees something where there is nothing to see, says nothing about a defense: its cells are marked unreliable.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

import torch

from deepenc.arena.build import Encryption, build_case
from deepenc.arena.case import Attack, Weakness
from deepenc.arena.checks.planted import (
    Alike,
    PlantedPlacement,
    planted_defense,
    planted_subject,
    random_subject,
)
from deepenc.arena.duel import Measured, measure, run_attack
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from deepenc.seeds import isolated

IMAGES = 128
CPU = torch.device("cpu")
SEED = 4711
SEEN = 0.99
"""AUC that a detector must reach on its planted weakness."""
REPAIRED = 0.5
"""Share of the lost accuracy that a repair must bring back."""
FALL = 0.1
"""How far accuracy may fall with more steps: the judge has 256 images, three deviations at 1/2."""
ALIKE = 24
"""Confusion channels a site, where nothing can be known."""
DEVIATIONS = 4.0
"""How far from chance an AUC may be where nothing can be known."""


def selftest(attack: Attack) -> str | None:
    """Try an attack on its planted weakness, and where there is nothing to see; seconds.

    Args:
        attack: With the parameters that are used.

    Returns:
        Why it is not to be relied on; None where it passed, or promises nothing.
    """
    if attack.detects is None:
        return None
    try:
        return _planted(attack, attack.detects) or _blind(attack)
    except Exception as error:  # whatever an attack raises makes it unreliable
        return f"in the self-test it raised {type(error).__name__}: {error}"


def _threat(attack: Attack, **more: Any) -> Threat:
    needs = attack.needs.given_by_threats()
    images = {what: max(IMAGES, needs[what]) for what in ("labelled", "unlabelled")}
    budgets = {what: max(4 * IMAGES, needs[what]) for what in ("oracle",)}
    return Threat(name="self-test", **{**needs, **images, **budgets, "allocation": True, **more})


def _planted(attack: Attack, tell: Weakness) -> str | None:
    threat = _threat(attack)
    encryption = _encryption(tell, threat.labelled + threat.unlabelled)
    got, steps = _fought(attack, encryption, threat)
    found, score = got.detection, got.score
    before = _rate(encryption)
    repaired = score is not None and not got.removed and score.value - before >= REPAIRED * (1 - before)
    if repaired or (found is not None and found.auc >= SEEN):
        return _falling(attack, encryption, threat, got, steps)
    seen = f"AUC {found.auc:.2f}" if found is not None else ""
    left = f"accuracy {score.value:.2f}" if score is not None else ""
    return f"on the planted weakness {tell!r} it got no further than {seen or left}"


def _falling(attack: Attack, encryption: Encryption, threat: Threat, got: Measured, steps: int) -> str | None:
    """Whether an attack that takes steps does better with a few of them than with all."""
    if not steps or got.score is None:
        return None
    few = max(1, steps // 8)
    less, _ = _fought(attack, encryption, threat.model_copy(update={"steps": few}))
    fall = (less.score.value if less.score is not None else 0.0) - got.score.value
    if fall <= FALL:
        return None
    return f"with {steps} steps it does worse than with {few}: accuracy falls by {fall:.2f}"


def _rate(encryption: Encryption) -> float:
    """Accuracy of the encrypted network, of 1 for the victim."""
    case = build_case(encryption, Threat(name="as it is"), SEED, SEED, CPU)
    judge = encryption.subject.victim.judge
    with torch.no_grad():
        right = case.encrypted(judge.inputs).argmax(dim=1) == judge.targets
    return float(right.double().mean())


def _blind(attack: Attack) -> str | None:
    """On a network at random, with confusion channels and labels at random, nothing can be known."""
    needs = attack.needs
    if needs.key_fraction or needs.public_checkpoint or needs.releases or needs.oracle:
        return None  # these tell of the key, and are meant to
    threat = _threat(attack)
    encryption = _random_encryption(threat.labelled + threat.unlabelled)
    found = _fought(attack, encryption, threat)[0].detection
    if found is None or abs(found.auc - 0.5) <= DEVIATIONS * _deviation(encryption):
        return None
    return f"where nothing can be known, it claims to know it: AUC {found.auc:.2f}"


def _fought(attack: Attack, encryption: Encryption, threat: Threat) -> tuple[Measured, int]:
    """What was measured, and the steps that the attack took."""
    with isolated(SEED):
        case = build_case(encryption, threat, SEED, SEED + 1, CPU)
        claim = run_attack(attack, case, attack.name)
        return measure(claim, case, encryption, attack.name, None), case.meter.steps


@cache
def _encryption(weakness: Weakness, images: int) -> Encryption:
    with isolated(SEED):
        return Encryption.of(planted_subject(images), planted_defense(weakness), _secret(weakness))


@cache
def _random_encryption(images: int) -> Encryption:
    defense = Defense(name="alike", placement=PlantedPlacement(count=ALIKE), weights=Alike())
    with isolated(SEED):
        return Encryption.of(random_subject(images), defense, _secret("alike"))


def _secret(what: str) -> bytes:
    return hashlib.sha256(f"self-test {what}".encode()).digest()


def _deviation(encryption: Encryption) -> float:
    """Standard deviation of the AUC under chance (Mann and Whitney 1947), all sites' pairs pooled."""
    pairs = variance = 0.0
    for site in encryption.key.sites:
        n, m = len(encryption.key.positions[site.name]), site.width
        pairs += n * m
        variance += n * m * (n + m + 1) / 12
    return math.sqrt(variance) / pairs
