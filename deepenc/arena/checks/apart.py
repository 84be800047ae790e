"""Checks in a process of their own, so that a plugin under check may exit, crash or hang."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

from deepenc.arena.checks.contract import Result, checks_for, once, run_check
from deepenc.processes.child import Handler, Tell, prepare
from deepenc.processes.pool import Jobs, Pool

LIMIT = 600.0
"""Seconds that one check may take."""


@dataclass(frozen=True)
class _Setup:
    """Makes a process ready to check a plugin."""

    plugin: bytes  # pickled: its class may be in one of the files
    plugin_files: tuple[Path, ...]

    def __call__(self) -> Handler:
        prepare(self.plugin_files)
        checks = checks_for(pickle.loads(self.plugin))

        def handle(number: int, tell: Tell) -> Result:
            return run_check(checks[number])

        return handle


@dataclass
class _Checks(Jobs[int]):
    """The checks in their order; after one that ended its process no other is tried."""

    names: list[str]
    limit: float
    tell: Callable[[Result], None]
    results: list[Result] = field(default_factory=list)
    ended: bool = False
    begun: float = 0.0

    def next(self, slot: int) -> int | None:
        return len(self.results) if self.left() else None

    def left(self) -> bool:
        return not self.ended and len(self.results) < len(self.names)

    def message(self, job: int) -> object:
        self.begun = time.monotonic()  # its process is ready
        return job

    def deadline(self, job: int) -> float | None:
        return self.begun + self.limit

    def overdue(self, job: int) -> None:
        self._ends(job, f"it takes more than {self.limit:g} s; give it less to do by default")

    def done(self, job: int, result: Result) -> None:
        self.results.append(once(result, self.results))
        self.tell(self.results[-1])

    def lost(self, job: int, reason: str) -> None:
        self._ends(job, f"it ends the process that it runs in: {reason}")

    def _ends(self, job: int, detail: str) -> None:
        self.done(job, Result(self.names[job], False, detail))
        self.ended = True


def run_apart(
    plugin: Any,
    plugin_files: tuple[Path, ...] = (),
    tell: Callable[[Result], None] = lambda _: None,
    limit: float = LIMIT,
) -> list[Result]:
    """Run all checks for a plugin in another process.

    Args:
        plugin: As for `checks_for`.
        plugin_files: Files that define it, and what it uses.
        tell: Is told each result.
        limit: Seconds that one check may take.

    Returns:
        The results, as far as the checks came: what ends its process, or takes too long, is the last.
    """
    checks = _Checks([check.name for check in checks_for(plugin)], limit, tell)
    setup = _Setup(cloudpickle.dumps(plugin), plugin_files)
    with tempfile.TemporaryDirectory() as folder, Pool(setup, 1, Path(folder, "out")) as pool:
        pool.run(checks)
    return checks.results
