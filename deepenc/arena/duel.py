"""One duel: encrypt, build the case, attack, measure."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from deepenc.arena.build import Encryption, build_case, fresh
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.metrics import checked_scores, detection, independent, judge, most_suspect
from deepenc.arena.plan import Duel
from deepenc.arena.provenance import Clock
from deepenc.arena.record import Cost, Detection, Record, Score
from deepenc.arena.threat import Meter, Threat, close
from deepenc.encryption.keys.key import secret_bytes
from deepenc.errors import ClaimError, ConfigError, OutOfBudget, explain
from deepenc.network.surgery import Layout, narrow_sites, remove
from deepenc.processes.residue import Surroundings
from deepenc.seeds import derive, isolated, number
from deepenc.victims.victim import Victim

log = logging.getLogger(__name__)

UNITS = 256
"""Examples that are counted at a time."""


def run_duel(duel: Duel, encryption: Callable[[], Encryption]) -> Record:
    """Fight one duel; whatever the attack does, a record comes back.

    Args:
        duel: Which.
        encryption: Gives the encrypted network; called only where the attack can be fought.
    """
    attack, threat = duel.cell.entry.attack, duel.cell.threat
    if missing := attack.needs.missing(threat):
        reason = f"threat {threat.name!r} does not give what the attack needs: {', '.join(missing)}"
        return duel.record(state="unsupported", reason=reason)
    clock = Clock(duel.device)
    record = _begun(duel, encryption)
    return record.model_copy(update={"provenance": clock.provenance()})


def _begun(duel: Duel, encryption: Callable[[], Encryption]) -> Record:
    cell = duel.cell
    threat, label = cell.threat, cell.entry.label
    surroundings = Surroundings()
    meter: Meter | None = None
    known: dict[str, Any] = {}
    try:
        try:
            with isolated(number(derive(duel.secret, "global generators")), duel.device):
                encrypted = encryption()
        except ConfigError as error:  # the defense cannot be made of this victim, and says why
            return duel.record(state="unsupported", reason=f"defense {cell.defense.name!r}: {error}")
        key = encrypted.key
        known = {
            "memory": encrypted.memory,
            "key_bits": float(key.entropy),
            "secret_bytes": secret_bytes(key),
        }
        if lacking := _lacking(cell.entry.attack, threat, encrypted.subject.victim):
            return duel.record(state="unsupported", reason=lacking, **known)
        with isolated(duel.seed, duel.device):
            case = build_case(encrypted, threat, duel.seed, duel.leak_seed, torch.device(duel.device))
            meter = case.meter
            known |= {"held": _held(case)}
            if pointless := cell.entry.attack.pointless(case):
                return duel.record(state="unsupported", reason=pointless, **known)
            claim = run_attack(cell.entry.attack, case, label)
        _restore(surroundings, label)
        with isolated(duel.seed, duel.device):
            measured = measure(claim, case, encrypted, label, duel.judge)
    except OutOfBudget as error:
        return duel.record(state="out_of_budget", reason=str(error), cost=_cost(meter), **known)
    except Exception as error:  # whatever an attack raises belongs into its cell, not into the run
        return duel.record(state="failed", reason=explain(error), cost=_cost(meter), **known)
    finally:
        _restore(surroundings, label)
    return duel.record(
        state="done",
        cost=_cost(meter),
        diverged=claim.diverged,
        **known,
        score=measured.score,
        removed=measured.removed,
        detection=measured.detection,
    )


def _restore(surroundings: Surroundings, label: str) -> None:
    if left := surroundings.restore():
        log.warning("attack %r left behind: %s", label, ", ".join(left))


def run_attack(attack: Attack, case: Case, label: str) -> Claim:
    """Let an attack loose on a case, metered.

    Raises:
        ClaimError: It hands back no claim, or an empty one.
        OutOfBudget: It asked for more than the threat model allows.
    """
    with case.meter.running():
        claim: Any = attack.attack(case)  # whatever it may be
    close(case.meter)
    if not isinstance(claim, Claim) or (claim.scores is None and claim.network is None):
        got = "a claim of nothing" if isinstance(claim, Claim) else type(claim).__name__
        raise ClaimError(f"attack {label!r}: expected a Claim with scores, a network, or both; got {got}")
    network: Any = claim.network
    if network is not None and not isinstance(network, nn.Module):
        got = type(network).__name__
        raise ClaimError(f"attack {label!r}: expected a torch.nn.Module as network, got {got}")
    assert isinstance(claim, Claim)
    return claim


@dataclass(frozen=True)
class Measured:
    """What a claim is worth; the fields are the record's.

    Attributes:
        score: Of the claimed network, or of what the arena made of the claimed scores.
        removed: Whether the arena made it.
        detection: How good the claimed scores are.
    """

    score: Score | None = None
    removed: bool = False
    detection: Detection | None = None


def measure(claim: Claim, case: Case, encrypted: Encryption, label: str, examples: int | None) -> Measured:
    """Measure what a claim is worth.

    Args:
        claim: The claim.
        case: The case it was made for.
        encrypted: What was attacked; only here is the key looked at.
        label: The attack's, for messages.
        examples: Judge's examples at most; None is all.

    Raises:
        ClaimError: The claim does not have the form that can be judged.
    """
    network, found, removed = claim.network, None, False
    if claim.scores is not None:
        scores = checked_scores(claim.scores, case.sites, label)
        found = detection(scores, case.sites, encrypted.key.positions)
        if network is None and case.allocation is not None:
            # From a new copy: an attack that changed the network of its case claims only its scores.
            suspects = most_suspect(scores, case.allocation)
            layout = Layout(narrow_sites(case.sites, suspects), suspects)
            network, removed = remove(fresh(encrypted, case.device), layout), True
    score = None
    if network is not None:
        score = judged(network, encrypted.subject.victim, label, examples, case.device)
    return Measured(score, removed, found)


def judged(network: nn.Module, victim: Victim, who: str, examples: int | None, device: torch.device) -> Score:
    """Score on the judge's examples; with fewer than all, always on the same ones."""
    part = victim.judge
    if examples is not None and examples < len(part):
        part = part[torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(part))[:examples]))]
    with independent(network, part, victim.task, who=who, device=device):
        return judge(network, part, victim.task, who=who, device=device)


def _lacking(attack: Attack, threat: Threat, victim: Victim) -> str | None:
    """What the attack needs of the task, or the threat model grants, and this victim has not, in words."""
    if lacks := attack.needs.lacking(victim.task):
        return f"the task {victim.task.name!r} does not offer what the attack needs: {', '.join(lacks)}"
    if threat.public_checkpoint and victim.public is None:
        return (
            f"threat {threat.name!r} gives the attacker the public network that the victim was fine-tuned "
            f"from; {victim.name!r} was not fine-tuned from one"
        )
    wanted, held = threat.labelled + threat.unlabelled, len(victim.attacker)
    if wanted <= held:
        return None
    return (
        f"threat {threat.name!r} gives the attacker {threat.labelled} labelled and {threat.unlabelled} "
        f"unlabelled examples, together {wanted}; the attacker's part of {victim.name!r} has {held}: ask for "
        "fewer"
    )


def _held(case: Case) -> dict[str, int]:
    """The attacker's examples in the task's own unit, where it has one."""
    task = case.task
    if task.unit == "examples":
        return {}
    batches = itertools.chain(case.labelled.batches(UNITS), case.unlabelled.batches(UNITS))
    return {task.unit: sum(task.units(inputs) for inputs, _ in batches)}


def _cost(meter: Meter | None) -> Cost:
    if meter is None:  # it ended before the attack began
        return Cost(samples=0, steps=0, seconds=0)
    return Cost(
        samples=meter.samples,
        steps=meter.steps,
        queries=meter.queries,
        trials=meter.trials,
        seconds=meter.seconds,
    )
