"""The cells of a run: handed out to workers, their records stored; only this side writes to the database."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from deepenc.arena.case import Attack
from deepenc.arena.plan import Duel
from deepenc.arena.provenance import code_version
from deepenc.arena.record import Record
from deepenc.arena.run.progress import Progress
from deepenc.arena.run.store import TIMEOUT, Store
from deepenc.arena.run.worker import Job, Outcome
from deepenc.plugins import parts_of
from deepenc.processes.pool import Jobs

LOOK = 2.0
"""Seconds between two looks at what other runs do, when this one has nothing to do."""

# What workers have found in self-tests, which take seconds: no other worker makes the same again.
_faults: dict[str, str | None] = {}


class Cells(Jobs[Duel]):
    """Deals out cells in groups that share an encryption, each group to one worker.

    When none is left to deal, it looks for those that other runs have taken: the cells of a run that is no
    more are taken over as soon as its lease has run out; those of a run that renews its lease are left to it.

    Args:
        duels: All cells of the plan.
        store: Takes the records.
        owner: Name of this run; it holds a lease.
        progress: Is told what goes on.
        timeout: Seconds that a cell may take, whatever its threat model allows; None is without limit.

    Attributes:
        run: Cells that this run has finished.
        encryptions: Encryptions made for them.
    """

    def __init__(
        self,
        duels: Sequence[Duel],
        store: Store,
        owner: str,
        progress: Progress,
        timeout: float | None = None,
    ) -> None:
        self._duels, self._store, self._owner, self._progress = duels, store, owner, progress
        self._timeout = timeout
        self._queues: dict[int, list[Duel]] = {}
        self._begun: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._looked, self._waiting = -math.inf, True
        self.run = self.encryptions = 0
        self._store.recover(owner)
        self._groups = self._planned()
        states = self._store.states().values()
        progress.planned(len(states), sum(state not in ("planned", "running") for state in states))

    @property
    def groups(self) -> int:
        """How many workers may have something to do."""
        return len(self._groups)

    def next(self, slot: int) -> Duel | None:
        """See `Jobs.next`."""
        queue = self._queues.setdefault(slot, [])
        while queue or self._groups:
            if not queue:
                queue += self._groups.pop(0)
            duel = queue.pop(0)
            if self._store.claim(duel.identity, self._owner):
                self._seen.clear()
                self._progress.started(duel.cell)
                return duel
        return None

    def left(self) -> bool:
        """See `Jobs.left`."""
        if self._groups or any(self._queues.values()):
            return True
        if time.monotonic() - self._looked >= LOOK:
            self._waiting = self._look_around()
            self._looked = time.monotonic()
        return self._waiting

    def _look_around(self) -> bool:
        """Take over what has become free; says whether to wait for more."""
        self._store.recover(self._owner)
        if self._store.planned():
            self._groups = self._planned()
        others = self._store.others(self._owner)
        waiting = any(self._seen.setdefault(owner, until) == until for owner, until in others.items())
        return bool(self._groups) or waiting

    def _planned(self) -> list[list[Duel]]:
        """The cells that nobody has taken, in groups that share an encryption, in the plan's order."""
        states = self._store.states()
        groups: dict[bytes, list[Duel]] = {}
        for duel in self._duels:
            if states.get(duel.identity) == "planned":
                groups.setdefault(duel.secret, []).append(duel)
        return list(groups.values())

    def message(self, job: Duel) -> Job:
        """See `Jobs.message`."""
        self._begun.pop(job.identity, None)
        return Job(job, tested=_named(job.cell.entry.attack) in _faults)

    def told(self, job: Duel, note: Any) -> None:
        """The clock of a cell starts with its attack, after the encryption; and again with a self-test."""
        self._begun[job.identity] = time.monotonic()

    def deadline(self, job: Duel) -> float | None:
        """See `Jobs.deadline`."""
        limit, begun = self._limit(job), self._begun.get(job.identity)
        return None if limit is None or begun is None else begun + limit

    def _limit(self, duel: Duel) -> float | None:
        limits = [limit for limit in (duel.cell.threat.seconds, self._timeout) if limit is not None]
        return min(limits, default=None)

    def overdue(self, job: Duel) -> None:
        """See `Jobs.overdue`."""
        limit, allowed = self._limit(job), job.cell.threat.seconds
        assert limit is not None
        if limit == allowed:
            reason = f"threat {job.cell.threat.name!r} allows {limit:g} s; the attack was still at work then"
        else:
            reason = f"{TIMEOUT}, {limit:g} s; give more time and try again with --retry-failed"
        self._store_record(job, job.record(state="out_of_budget", reason=reason))

    def done(self, job: Duel, result: Outcome) -> None:
        """See `Jobs.done`."""
        self.encryptions += result.encryptions
        record = result.record
        if record.state == "done":
            fault = _faults.setdefault(_named(job.cell.entry.attack), record.unreliable)
            record = record.model_copy(update={"unreliable": fault})
        self._store_record(job, record)

    def lost(self, job: Duel, reason: str) -> None:
        """See `Jobs.lost`."""
        self._store_record(job, job.record(state="failed", reason=reason))

    def _store_record(self, duel: Duel, record: Record) -> None:
        self._begun.pop(duel.identity, None)
        if self._store.finish(record, self._owner):
            self._progress.finished(duel.cell, record)
            self.run += 1

    def watch(self, running: Sequence[tuple[Duel, float]]) -> None:
        """See `Jobs.watch`."""
        self._progress.running([(duel.cell, seconds) for duel, seconds in running])


def _named(attack: Attack) -> str:
    """An attack with its parameters and its code, as text."""
    return json.dumps([attack.spec(), *map(code_version, parts_of(attack))], sort_keys=True)
