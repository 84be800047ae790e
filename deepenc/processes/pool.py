"""The one loop that gives jobs to worker processes, and replaces those that die or take too long.

A worker says that it is ready before it gets a job, so that what keeps it from starting is never blamed on
a job. A job whose worker dies is tried once more; one that kills `ATTEMPTS` workers is lost, and the rest
goes on.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from deepenc.errors import WorkerError
from deepenc.processes.child import Handler
from deepenc.processes.worker import Worker

Job = TypeVar("Job")

ATTEMPTS = 2
"""Workers that a job may cost before it is lost."""

STARTS = 5
"""Workers in a row that may be killed from outside before they are ready."""

PAUSE = 1.0
"""Seconds between two looks at what happens without a message: deadlines, and jobs that become free."""


class Jobs(ABC, Generic[Job]):
    """Hands out jobs and takes what comes of them; only ever called in the process that coordinates."""

    @abstractmethod
    def next(self, slot: int) -> Job | None:
        """The next job for the worker of a slot, counted from 0; None where there is none now."""

    @abstractmethod
    def left(self) -> bool:
        """Whether `next` may still give a job, now or later."""

    @abstractmethod
    def done(self, job: Job, result: Any) -> None:
        """A job's handler has returned."""

    @abstractmethod
    def lost(self, job: Job, reason: str) -> None:
        """A job has killed all the workers that it may cost."""

    def message(self, job: Job) -> object:
        """What the handler is given for a job."""
        return job

    def told(self, job: Job, note: Any) -> object:
        """Answer a note that a handler sends under way."""
        return None

    def deadline(self, job: Job) -> float | None:
        """When to stop a job, on the clock of `time.monotonic`; None is never."""
        return None

    def overdue(self, job: Job) -> None:
        """A job was stopped at its deadline."""

    def watch(self, running: Sequence[tuple[Job, float]]) -> None:
        """About once a second: the jobs that run, and since how many seconds."""


@dataclass
class _Slot(Generic[Job]):
    """A place for a worker, and what it is doing."""

    number: int
    worker: Worker | None = None
    job: Job | None = None
    since: float = 0.0
    again: Job | None = None
    deaths: int = 0

    def is_busy(self) -> bool:
        """Whether it has a job, one to be tried again, or a worker that is starting."""
        starting = self.worker is not None and not self.worker.ready
        return starting or self.job is not None or self.again is not None


@dataclass
class Pool:
    """Worker processes; all are gone when it is left. They are started when there is something to do.

    Attributes:
        setup: Called in each process before its first job; gives what runs the jobs.
        size: Processes at most.
        output: File that all that they print is added to.
    """

    setup: Callable[[], Handler]
    size: int
    output: Path
    _slots: list[_Slot[Any]] = field(default_factory=list, init=False)
    _killed_at_start: int = field(default=0, init=False)

    def __enter__(self) -> Self:
        self._slots = [_Slot(number) for number in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            if slot.worker is not None:
                slot.worker.end()

    def run(self, jobs: Jobs[Any]) -> None:
        """Run jobs until none is left.

        Raises:
            WorkerError: A process cannot start.
            DeepencError: Raised by a handler: an error that concerns all jobs.
        """
        while True:
            for slot in self._slots:
                self._give(slot, jobs)
            if not any(slot.is_busy() for slot in self._slots) and not jobs.left():
                return
            self._wait(jobs)
            for slot in self._slots:
                self._hear(slot, jobs)
                self._stop_overdue(slot, jobs)
            now = time.monotonic()
            jobs.watch([(slot.job, now - slot.since) for slot in self._slots if slot.job is not None])

    def _give(self, slot: _Slot[Any], jobs: Jobs[Any]) -> None:
        """A job for a slot that has none, or a worker that can take one."""
        if slot.job is not None:
            return
        if slot.worker is None:
            if slot.again is not None or jobs.left():
                self._start(slot)
        elif slot.worker.ready:
            retried, slot.again = slot.again, None
            slot.job = jobs.next(slot.number) if retried is None else retried
            if slot.job is not None:
                slot.deaths = 0 if retried is None else slot.deaths
                slot.since = time.monotonic()
                slot.worker.send(jobs.message(slot.job))

    def _start(self, slot: _Slot[Any]) -> None:
        try:
            slot.worker = Worker(self.setup, self.output)
        except (OSError, EOFError) as error:  # the process that workers are forked from was killed just now
            self._killed_at_start += 1
            if self._killed_at_start >= STARTS:
                raise WorkerError(
                    f"a worker process cannot be started: {error!r}; is memory left?"
                ) from error

    def _wait(self, jobs: Jobs[Any]) -> None:
        """Until a worker has said something or died, or it is time to look around."""
        workers = [slot.worker for slot in self._slots if slot.worker is not None]
        deadlines = [jobs.deadline(slot.job) for slot in self._slots if slot.job is not None]
        left = [deadline - time.monotonic() for deadline in deadlines if deadline is not None]
        handles = [handle for worker in workers for handle in (worker.connection, worker.process.sentinel)]
        wait(handles, max(0.0, min([PAUSE, *left])))

    def _hear(self, slot: _Slot[Any], jobs: Jobs[Any]) -> None:
        worker = slot.worker
        if worker is None or not wait([worker.connection, worker.process.sentinel], 0):
            return
        message = worker.receive()
        match message:
            case None:
                self._died(slot, worker, jobs)
            case "ready", _:
                worker.ready, self._killed_at_start = True, 0
            case "note", note:
                worker.send(jobs.told(slot.job, note))
            case "result", (result, clean):
                job, slot.job = slot.job, None
                jobs.done(job, result)
                if not clean:  # the job has left threads or processes behind, which might disturb the next
                    worker.end()
                    slot.worker = None
            case _, error:
                raise error

    def _died(self, slot: _Slot[Any], worker: Worker, jobs: Jobs[Any]) -> None:
        """Try the job of a dead worker once more, or give it up."""
        reason = worker.exit_reason()
        by_itself, was_ready, excerpt = worker.failed_by_itself(), worker.ready, worker.excerpt()
        worker.end()
        job, slot.job, slot.worker = slot.job, None, None
        if not was_ready:
            self._killed_at_start += 1
            if by_itself or self._killed_at_start >= STARTS:
                raise WorkerError(
                    f"a worker process cannot start ({reason}); nothing was run in it. If a script of yours "
                    'starts the run, put the call under `if __name__ == "__main__":`. It printed:\n'
                    f"{excerpt or 'nothing'}"
                )
        if job is None:
            return
        slot.deaths += 1
        if slot.deaths < ATTEMPTS:
            slot.again = job
        else:
            last = f"; last printed:\n{excerpt}" if excerpt else ""
            jobs.lost(job, f"the worker process died {slot.deaths} times ({reason}){last}")

    def _stop_overdue(self, slot: _Slot[Any], jobs: Jobs[Any]) -> None:
        if slot.job is None or slot.worker is None:
            return
        deadline = jobs.deadline(slot.job)
        if deadline is None or time.monotonic() < deadline or slot.worker.connection.poll():
            return
        slot.worker.end()
        job, slot.job, slot.worker = slot.job, None, None
        jobs.overdue(job)
