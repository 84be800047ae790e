"""Worker processes at the end of a pipe, which go when whoever started them does."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from deepenc.plugins import load_file

Job = TypeVar("Job")
Each = TypeVar("Each", bound="Worker[Any]")


class Worker(Generic[Job]):
    """A process, its connection, and what it is at.

    Args:
        body: Runs in the process; its first argument is the connection, and `settle` its first call.
        *args: The others.

    Attributes:
        task: What it is at, or None; kept by whoever gives it something.
    """

    def __init__(self, body: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=body, args=(theirs, *args), daemon=True)
        with _interrupts_ignored():
            self.process.start()
        theirs.close()
        self.task: Job | None = None

    def send(self, message: object) -> None:
        """Tell it something; one that is gone is noticed when it is waited for."""
        try:
            self.connection.send_bytes(pickle.dumps(message))
        except OSError:
            return

    def receive(self) -> Any:
        """What it said, or None where it died instead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

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
        if code is None or code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}; out of memory?" if -code == signal.SIGKILL else name


class Crew(Generic[Each]):
    """Worker processes; all are gone when it is left.

    Args:
        size: How many.
        start: Starts one.

    Attributes:
        workers: Those there are, once it is entered.
    """

    def __init__(self, size: int, start: Callable[[], Each]) -> None:
        self._size, self._start = size, start
        self.workers: list[Each] = []

    def __enter__(self) -> Crew[Each]:
        try:
            for _ in range(self._size):
                self._add()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def replace(self, worker: Each) -> Each:
        """Start one for another that died."""
        worker.end()
        self.workers.remove(worker)
        return self._add()

    def _add(self) -> Each:
        worker = self._start()
        self.workers.append(worker)
        return worker


def ready(workers: Sequence[Each]) -> list[Each]:
    """Of the busy workers those that have said something, or died; waits for the first."""
    busy = {worker.connection: worker for worker in workers if worker.task is not None}
    return [busy[found] for found in wait(list(busy)) if isinstance(found, Connection)]


def threads(workers: int) -> int:
    """Torch's threads for each of some processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores // max(1, workers)))


def settle(own_threads: int, plugin_files: Sequence[Path]) -> None:
    """Make the process that this runs in a worker.

    Args:
        own_threads: For torch.
        plugin_files: To be loaded first.
    """
    # Ctrl-C reaches every process of a terminal; the coordinator decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(own_threads)
    for path in plugin_files:
        load_file(path)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """A process started here ignores Ctrl-C from its first instant."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
