"""A worker process, as the process that started it sees it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import cloudpickle

from deepenc.processes.child import Handler, Settings, work
from deepenc.processes.tree import stop_tree

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""A forked copy of this process would have its threads' locks, but not its threads: autograd refuses that."""

SECRETS = ("DEEPENC_PASSPHRASE",)
"""Variables of the environment that no worker gets: plugins run there."""

_one_at_a_time = threading.Lock()

EXCERPT = 3000
"""Characters of a worker's output in an error."""


def warm_up(modules: Sequence[str]) -> None:
    """Start, in the background, the process that workers are forked from; it imports some modules first."""
    if METHOD == "forkserver":
        forkserver.set_forkserver_preload(list(modules))
        with _starting():
            forkserver.ensure_running()


class Worker:
    """A child process that runs jobs one at a time.

    Args:
        setup: Called in the process before its first job; gives what runs the jobs.
        output: File that all it prints is added to.
    """

    def __init__(self, setup: Callable[[], Handler], output: Path) -> None:
        context: Any = multiprocessing.get_context(METHOD)
        self.connection, theirs = context.Pipe()
        self._output = output
        self._before = output.stat().st_size if output.exists() else 0
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        self._settings = Settings.of(setup, output, environment)
        self.process = context.Process(target=work, args=(theirs, self._settings))
        with _starting():
            self.process.start()
        theirs.close()
        self.ready = False

    def send(self, message: object) -> None:
        """Send something; a worker that is gone is noticed when it is waited for."""
        data = cloudpickle.dumps(message)
        try:
            self.connection.send_bytes(data)
        except OSError:
            return

    def receive(self) -> tuple[str, Any] | None:
        """The next message, or None where the worker died instead."""
        try:
            if self.connection.poll():
                kind, value = self.connection.recv()
                return kind, value
        except Exception:  # a message cut in the middle, or forged by what runs there
            return None
        return None

    def exit_reason(self) -> str:
        """How the process ended, in words."""
        self.process.join(5)
        code = self.process.exitcode
        if code is None:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}; out of memory?" if -code == signal.SIGKILL else name

    def failed_by_itself(self) -> bool:
        """Whether the process has ended without a signal from outside."""
        return (self.process.exitcode or 0) >= 0

    def excerpt(self) -> str:
        """The end of what was printed since it started."""
        try:
            with self._output.open("rb") as file:
                file.seek(max(self._before, os.fstat(file.fileno()).st_size - EXCERPT))
                return file.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def end(self) -> None:
        """End the process, whatever it is doing, and all that it has started."""
        self.connection.close()
        if self.process.pid is not None:
            stop_tree(self.process.pid, self._settings.mark)
        self.process.kill()
        self.process.join()
        self.process.close()


@contextmanager
def _starting() -> Iterator[None]:
    """What a process started inside does not get: Ctrl-C, the passphrase, the script that runs here.

    multiprocessing would run the main script again in every child, which then needs a guard. Nothing here
    wants it: what a script defines travels by value.
    """
    with _one_at_a_time:
        hidden = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
        main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
        try:
            yield
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)
            sys.modules["__main__"] = main
            os.environ.update(hidden)
