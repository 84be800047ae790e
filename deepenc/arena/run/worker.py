"""Fights cells one at a time, and keeps at hand what neighbouring cells share; here or in a process."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from deepenc.arena.build import Encryption, Subject
from deepenc.arena.case import Attack
from deepenc.arena.checks.selftest import selftest
from deepenc.arena.duel import duel
from deepenc.arena.plan import Cell, Task
from deepenc.arena.record import Record
from deepenc.errors import DeepencError
from deepenc.processes import settle
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
            VictimError: Weights or data are missing or unusable.
        """
        if source not in self._victims:
            self._victims[source] = source.load(self._cache)
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

    def fight(self, task: Task) -> Record:
        """Fight the duel of a cell.

        Raises:
            DeepencError: The victim cannot be loaded, or has no site; nothing the attack does raises.
        """
        self.subject(task.cell.victim)
        record = duel(task, lambda: self.encryption(task.cell, task.secret))
        if record.state != "done":
            return record
        return record.model_copy(update={"unreliable": self._fault(task.cell.entry.attack)})

    def _fault(self, attack: Attack) -> str | None:
        """Why an attack fails its self-test, made once; None where it passes."""
        name = json.dumps(attack.spec(), sort_keys=True)
        if name not in self._faults:
            self._faults[name] = selftest(attack)
        return self._faults[name]


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: a record, or the error that no cell can be blamed for."""

    record: Record | None
    error: DeepencError | None
    encryptions: int


def serve(connection: Connection, cache: Path, plugin_files: Sequence[Path], threads: int) -> None:
    """Body of a worker process: takes pickled tasks until the connection ends.

    Args:
        connection: To the coordinator.
        cache: Folder of the victims.
        plugin_files: Loaded first, so that tasks can name their plugins.
        threads: For torch.
    """
    settle(threads, plugin_files)
    workspace = Workspace(cache)
    while True:
        try:
            task: Task = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            outcome = Outcome(workspace.fight(task), None, workspace.encryptions)
        except DeepencError as error:
            outcome = Outcome(None, error, workspace.encryptions)
        try:
            connection.send(outcome)
        except OSError:
            return
