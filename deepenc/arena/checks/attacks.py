"""What every attack promises."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from functools import cached_property, partial
from typing import get_args

import torch
from torch import Tensor

from deepenc import trees
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.checks.base import Broken, Check, NothingPromised, differing, snapshot, watched
from deepenc.arena.checks.bounds import check_ends
from deepenc.arena.checks.selftest import selftest
from deepenc.arena.checks.tiny import TinySource, Unusual, host_defense, tiny_subject, unusual_subject
from deepenc.arena.duel import measure, run_attack, run_duel
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.threat import Threat
from deepenc.encryption.keys.key import Key
from deepenc.errors import OutOfBudget
from deepenc.seeds import isolated

CPU = torch.device("cpu")
SEED = 4242
LABELLED = UNLABELLED = 64
SMALL = {"steps": 2, "samples": 2000}


def attack_checks(attack: Attack) -> list[Check]:
    """The checks for one attack."""
    bench = Bench(attack)
    return [
        Check("makes a claim that can be judged", bench.check_claim),
        Check("leaves its case, the global generators and the grad mode as they were", bench.check_untouched),
        Check("claims the same for the same seed", bench.check_deterministic),
        Check("runs with no more than it says it needs, and is refused with less", bench.check_needs),
        Check("keeps to a budget of nothing", bench.check_budget),
        *(Check(f"bears {kind}", partial(bench.check_unusual, kind)) for kind in get_args(Unusual)),
        Check("runs at the bounds of its parameters", bench.check_bounds),
        Check("claims the same whatever the key", bench.check_blind),
        Check("sees the planted weakness that it promises to see", bench.check_promise),
    ]


class Bench:
    """One attack and the tiny network it is checked on; what several checks need is made once."""

    case_of_first: Case
    disturbances: list[str]
    changed: list[str]

    def __init__(self, attack: Attack) -> None:
        self.attack = attack
        needs = attack.needs.given_by_threats()
        images = {
            "labelled": max(LABELLED, needs["labelled"]),
            "unlabelled": max(UNLABELLED, needs["unlabelled"]),
        }
        self.threat = Threat(name="generous", **needs | images | {"architecture": True, "allocation": True})

    @cached_property
    def encryption(self) -> Encryption:
        """The tiny network under a defense that any attack may meet."""
        subject = tiny_subject(max(256, self.threat.labelled + self.threat.unlabelled))
        return Encryption.of(subject, host_defense(), hashlib.sha256(b"contract").digest())

    def case(self, threat: Threat | None = None, encryption: Encryption | None = None) -> Case:
        """A new case, the same every time."""
        return build_case(encryption or self.encryption, threat or self.threat, SEED, SEED + 1, CPU)

    def claim(self, case: Case) -> Claim:
        """Attack, as the arena does."""
        with isolated(SEED):
            return run_attack(self.attack, case, self.attack.name)

    @cached_property
    def first(self) -> Claim:
        """The claim that the checks share: attacks may be slow."""
        case = self.case()
        before = snapshot(case.encrypted) | _images(case)
        training = case.encrypted.training
        with isolated(SEED), watched() as self.disturbances:
            claim = run_attack(self.attack, case, self.attack.name)
        self.changed = differing(before, snapshot(case.encrypted) | _images(case))
        if case.encrypted.training != training:
            self.changed.append("training mode")
        self.case_of_first = case
        return claim

    def check_claim(self) -> None:
        """The claim's form is right: the measurement itself complains where it is not."""
        claim = self.first
        measured = measure(claim, self.case_of_first, self.encryption, self.attack.name, 64)
        unreadable = 0 if measured.score is None else measured.score.unreadable
        if unreadable:
            raise Broken(f"the claimed network gives NaN for {unreadable} of 64 images")

    def check_untouched(self) -> None:
        """Of the first claim."""
        assert self.first
        if self.disturbances:
            raise Broken(f"it {'; '.join(self.disturbances)}")
        if self.changed:
            raise Broken(f"it changed {self.changed[:5]} of its case; work on case.copy()")

    def check_deterministic(self) -> None:
        """Twice the same case, twice the same claim."""
        if changed := self.unsteady:
            raise Broken(
                f"two runs with one seed differ in {changed[:5]}; draw every random number from "
                "case.generator() or case.seed"
            )

    @cached_property
    def unsteady(self) -> list[str]:
        """What is another thing at each call, on one and the same case; not asked where nothing differs."""
        if not self._differs(self.second):
            return []
        return self._differs(self.claim(self.case())) or self._differs(self.claim(self.case()))

    @cached_property
    def second(self) -> Claim:
        """A claim on the same network, where the arena holds another key for it."""
        key = self.encryption.key
        shifted = {name: _shift(p, site_width(key, name)) for name, p in key.positions.items()}
        wrong = dataclasses.replace(key, positions=shifted)
        return self.claim(self.case(encryption=dataclasses.replace(self.encryption, key=wrong)))

    def _differs(self, claim: Claim) -> list[str]:
        return differing(content(self.first), content(claim))

    def check_needs(self) -> None:
        """Under a threat model that gives exactly what is needed, and under one that gives less."""
        needs = self.attack.needs
        exact = Threat(name="exact", **needs.given_by_threats())
        self._expect(exact, {"done"})
        if needs.missing(bare := Threat(name="bare", architecture=False, allocation=False)):
            self._expect(bare, {"unsupported"})

    def _expect(self, threat: Threat, states: set[str]) -> None:
        cell = Cell(TinySource(), self.encryption.defense, Entry(attack=self.attack), threat, 0, 0)
        duel = Duel(cell, "contract", bytes(32), SEED, SEED + 1, 64, "cpu")
        record = run_duel(duel, lambda: self.encryption)
        if record.state not in states:
            raise Broken(
                f"{(record.reason or '').partition(chr(10))[0][:300]}: so it ended as {record.state!r}, not "
                f"{' or '.join(sorted(states))}, given {_given(threat)}; does `needs` say all that it needs?"
            )

    def check_budget(self) -> None:
        """A budget of nothing stops it cleanly, or it needs none."""
        case = self.case(self.threat.model_copy(update={"samples": 0, "steps": 0}))
        with contextlib.suppress(OutOfBudget):
            self.claim(case)
        if case.meter.samples or case.meter.steps:
            raise Broken(
                f"it spent {case.meter.samples} samples and {case.meter.steps} steps of a budget of nothing"
            )

    def check_bounds(self) -> None:
        """A claim that can be measured, or words; with a small budget."""

        def act(attack: Attack) -> None:
            bench = Bench(attack)
            lack = bench.threat.model_copy(update=SMALL)
            case = build_case(self.encryption, lack, SEED, SEED + 1, CPU)
            if (
                len(case.labelled) >= attack.needs.labelled
                and len(case.unlabelled) >= attack.needs.unlabelled
            ):
                measure(bench.claim(case), case, self.encryption, attack.name, 16)

        check_ends(self.attack, act)

    def check_unusual(self, kind: Unusual) -> None:
        """A claim that can be measured."""
        subject = unusual_subject(kind, max(256, self.threat.labelled + self.threat.unlabelled))
        encryption = Encryption.of(subject, host_defense(), hashlib.sha256(b"contract").digest())
        case = self.case(encryption=encryption)
        measure(self.claim(case), case, encryption, self.attack.name, 64)

    def check_blind(self) -> None:
        """The encrypted network stays, the key that the arena holds is another one."""
        if self.attack.needs.key_fraction:
            raise NothingPromised("part of the key is what it is given")
        if self.unsteady:
            raise NothingPromised("its claim changes with every call")
        if changed := self._differs(self.second):
            raise Broken(f"its claim changes with the key ({changed[:5]}): it found a way to see it")

    def check_promise(self) -> None:
        """Its self-test, which the arena makes too."""
        told = self.attack.detects
        if told is None:
            raise NothingPromised("it promises to see none")
        if told not in get_args(Weakness):
            raise Broken(f"`detects` is {told!r}; expected None, or one of {', '.join(get_args(Weakness))}")
        if fault := selftest(self.attack):
            raise Broken(fault)


def site_width(key: Key, name: str) -> int:
    """Width of an encrypted site."""
    widths = {site.name: site.width for site in key.sites}
    return widths[name] + len(key.positions[name])


def _shift(positions: tuple[int, ...], width: int) -> tuple[int, ...]:
    return tuple(sorted((position + 1) % width for position in positions))


def content(claim: Claim) -> dict[str, Tensor]:
    """All tensors of a claim, by name."""
    tensors = {f"scores of {name}": scores.detach().clone() for name, scores in (claim.scores or {}).items()}
    if claim.network is not None:
        tensors |= {f"network's {name}": tensor for name, tensor in snapshot(claim.network).items()}
    return tensors


def _images(case: Case) -> dict[str, Tensor]:
    parts = {"labelled": tuple(case.labelled.batch()), "unlabelled": case.unlabelled.inputs}
    return {
        f"{name} {i}": tensor.clone()
        for name, part in parts.items()
        for i, tensor in enumerate(trees.tensors(part))
    }


def _given(threat: Threat) -> str:
    given = {name: value for name, value in threat.model_dump(exclude={"name"}).items() if value}
    return str(given) if given else "nothing but the network"
