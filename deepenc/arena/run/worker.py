"""Runs cells one at a time, and keeps at hand what neighbouring cells share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cloudpickle

from deepenc.arena.build import Encryption, Subject
from deepenc.arena.case import Attack
from deepenc.arena.checks.selftest import selftest
from deepenc.arena.duel import run_duel
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.record import Record
from deepenc.errors import DeepencError, explain
from deepenc.processes.child import Handler, Tell, prepare
from deepenc.victims.sources.given import give
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim, VictimSource


class Workspace:
    """Victims, their sites, and the latest encryption.

    Args:
        cache: Folder of the victims.

    Attributes:
        encryptions: How many encryptions were made.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._victims: dict[VictimSource, Victim] = {}
        self._subjects: dict[VictimSource, Subject] = {}
        self._latest: tuple[bytes, Encryption] | None = None
        self._faults: dict[str, str | None] = {}
        self.encryptions = 0

    def victim(self, source: VictimSource) -> Victim:
        """A victim, loaded once.

        Raises:
            VictimError: Weights or data are missing, unusable, or not as `Victim` says.
        """
        if source not in self._victims:
            self._victims[source] = validated(source.load(self._cache))
        return self._victims[source]

    def subject(self, source: VictimSource) -> Subject:
        """A victim with its sites, found once.

        Raises:
            TraceError: Its operators cannot be followed.
            SiteError: It has no site.
        """
        if source not in self._subjects:
            self._subjects[source] = Subject.of(self.victim(source))
        return self._subjects[source]

    def encryption(self, cell: Cell, secret: bytes) -> Encryption:
        """The encryption of a cell; neighbours in the plan share it."""
        if self._latest is None or self._latest[0] != secret:
            self._latest = None  # let go of the old one first: two may not fit into memory
            made = Encryption.of(self.subject(cell.victim), cell.defense, secret)
            self._latest = (secret, made)
            self.encryptions += 1
        return self._latest[1]

    def run(self, duel: Duel, begun: Callable[[], object] = lambda: None, *, tested: bool = False) -> Record:
        """Run the duel of a cell.

        Args:
            duel: Which.
            begun: Called when the time of the attack begins, and again when that of its self-test does.
            tested: Leave the self-test out.

        Raises:
            DeepencError: The victim cannot be loaded, or has no site; nothing the attack does raises.
        """

        def encryption() -> Encryption:
            made = self.encryption(duel.cell, duel.secret)
            begun()
            return made

        self.subject(duel.cell.victim)
        record = run_duel(duel, encryption)
        if tested or record.state != "done":
            return record
        begun()
        return record.model_copy(update={"unreliable": self._fault(duel.cell.entry.attack)})

    def _fault(self, attack: Attack) -> str | None:
        """Why an attack fails its self-test, made once; None where it passes."""
        name = json.dumps(attack.spec(), sort_keys=True)
        if name not in self._faults:
            self._faults[name] = selftest(attack)
        return self._faults[name]


@dataclass(frozen=True)
class Job:
    """What a worker is sent.

    Attributes:
        duel: The cell.
        tested: Whether it is known already how the attack does in its self-test.
    """

    duel: Duel
    tested: bool


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back.

    Attributes:
        record: Of the cell.
        encryptions: Encryptions made for it.
    """

    record: Record
    encryptions: int


@dataclass(frozen=True)
class Setup:
    """Makes a process ready to run cells.

    Attributes:
        cache: Folder of the victims.
        plugin_files: Loaded first, so that cells can name their plugins.
        given: Victims that are in the coordinator's memory alone, pickled: what they are made of may be in
            the plugin files.
    """

    cache: Path
    plugin_files: tuple[Path, ...]
    given: bytes | None = None

    def __call__(self) -> Handler:
        """Called once in each process; gives what runs a cell."""
        prepare(self.plugin_files)
        for victim in () if self.given is None else cloudpickle.loads(self.given):
            give(victim)
        workspace = Workspace(self.cache)

        def handle(job: Job, tell: Tell) -> Outcome:
            before = workspace.encryptions
            try:
                record = workspace.run(job.duel, lambda: tell(None), tested=job.tested)
            except DeepencError:  # of the victim: it concerns all its cells
                raise
            except BaseException as error:  # a plugin may exit; no Ctrl-C reaches a worker
                record = job.duel.record(state="failed", reason=explain(error))
            return Outcome(record, workspace.encryptions - before)

        return handle
