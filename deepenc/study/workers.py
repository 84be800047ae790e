"""Processes that fight trials; they never touch the study, so that nothing they do can spoil it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from deepenc.arena.record import Record
from deepenc.plugins import load_file
from deepenc.study.search import Search
from deepenc.study.trials import Evaluator, Result


@dataclass(frozen=True)
class Brief:
    """All that a worker must know, once.

    Attributes:
        search: As text (pydantic's plugins of the user's files must be loaded before they can be named).
        cache: Folder of the victims.
        root: Root of the tuning keys and seeds.
        references: Measured already.
        plugin_files: To be loaded first.
        threads: For torch.
    """

    search: dict[str, Any]
    cache: Path
    root: bytes
    references: tuple[Record, ...]
    plugin_files: tuple[Path, ...]
    threads: int


@dataclass(frozen=True)
class Step:
    """How a trial goes; the worker waits to be told whether to give up."""

    step: int
    value: float


class Worker:
    """A process, its connection, and the trial it is at."""

    def __init__(self, brief: Brief) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, brief), daemon=True)
        self.process.start()
        theirs.close()
        self.trial: Any = None

    def send(self, message: object) -> None:
        """Tell it something; one that is gone is noticed when it is waited for."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def receive(self) -> Step | Result | None:
        """What it said, or None where it died instead."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            return None
        assert isinstance(said, Step | Result)
        return said

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def death(self) -> str:
        """How it died, in words."""
        self.process.join(5)
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def ready(workers: Sequence[Worker]) -> list[Worker]:
    """Of the busy workers those that have said something, or died; waits for the first."""
    busy = {worker.connection: worker for worker in workers if worker.trial is not None}
    return [busy[found] for found in wait(list(busy)) if isinstance(found, Connection)]


def threads(workers: int) -> int:
    """Torch's threads for each of some processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores // workers))


def _serve(connection: Connection, brief: Brief) -> None:
    # Ctrl-C reaches every process of a terminal; the coordinator decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(brief.threads)
    for path in brief.plugin_files:
        load_file(path)
    evaluator = Evaluator(Search.model_validate(brief.search), brief.cache, brief.root)
    evaluator.references = brief.references

    def report(step: int, value: float) -> bool:
        connection.send(Step(step, value))
        return bool(connection.recv())

    while True:
        try:
            values: Mapping[str, Any] = connection.recv()
            connection.send(evaluator.run(values, report))
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
