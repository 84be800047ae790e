"""What runs in a worker process: get ready, run jobs one at a time, end with whoever started it."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import pickle
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import cloudpickle

from deepenc.errors import DeepencError, WorkerError
from deepenc.processes.tree import MARK, stop_tree

Tell = Callable[[object], Any]
"""Sends the coordinator a note, and gives its answer."""

Handler = Callable[[Any, Tell], Any]
"""Runs a job: gets its message, and gives its result."""


@dataclass(frozen=True)
class Settings:
    """All that a process must know to begin.

    Attributes:
        setup: Pickled: a function that gives the handler.
        output: File that all that is printed is added to.
        environment: Variables of its environment.
        folder: Where it works.
        mark: Which worker it is; all its children have it in their environment.
    """

    setup: bytes
    output: Path
    environment: Mapping[str, str]
    folder: str
    mark: str

    @classmethod
    def of(cls, setup: Callable[[], Handler], output: Path, environment: Mapping[str, str]) -> Self:
        """Settings of a new worker."""
        mark = uuid.uuid4().hex
        environment = {**environment, MARK: mark}
        return cls(cloudpickle.dumps(setup), output.absolute(), environment, os.getcwd(), mark)


def prepare(plugin_files: Sequence[Path]) -> None:
    """Make results depend on nothing but the job: one thread, whatever the number of workers and cores.

    Args:
        plugin_files: Loaded, so that jobs can name their plugins.
    """
    import torch
    from threadpoolctl import threadpool_limits

    from deepenc.plugins import load_file

    torch.set_num_threads(1)
    threadpool_limits(1)
    for path in plugin_files:
        load_file(path)


def work(connection: Connection, settings: Settings) -> None:
    """Body of a worker process.

    Args:
        connection: To the coordinator.
        settings: What to do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what becomes of its workers
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, args=(settings.mark,), daemon=True).start()
    _redirect(settings.output)
    os.environ.clear()
    os.environ.update(settings.environment)
    os.chdir(settings.folder)
    own = os.getpid()

    def send(kind: str, value: object) -> None:
        if os.getpid() != own:
            os._exit(0)  # a copy that a job has forked must not answer for it
        try:
            connection.send((kind, value))
        except OSError:  # the coordinator is gone, or a job has closed the connection
            os._exit(1)

    def tell(note: object) -> Any:
        send("note", note)
        return pickle.loads(connection.recv_bytes())

    try:
        handler = pickle.loads(settings.setup)()
        send("ready", None)
        while (data := _received(connection)) is not None:
            before = set(threading.enumerate())
            result = handler(_job(data), tell)
            _flush()
            send("result", (result, _is_clean(before)))
    except DeepencError as error:
        send("error", error)


def _received(connection: Connection) -> bytes | None:
    """The next message; None where the coordinator has closed the connection."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return None


def _job(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:
        raise WorkerError(
            f"a worker process cannot read its job: {type(error).__name__}: {error}; is a class of it in a "
            "file that the process cannot import? Name that file among the plugin files"
        ) from error


def _is_clean(before: set[threading.Thread]) -> bool:
    """Whether a job has left nothing that may disturb the next; an alarm that it has set is turned off."""
    watch = sys.modules.get("deepenc.processes.residue")  # torch is heavy: only where a job has loaded it
    if watch is not None and watch.residue() is not None:
        return False
    if any(stream is None or stream.closed for stream in (sys.stdout, sys.stderr)):
        return False
    if not hasattr(os, "WNOHANG"):
        return set(threading.enumerate()) <= before
    signal.alarm(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:  # ended already
            pass
    except ChildProcessError:
        return set(threading.enumerate()) <= before
    return False


def _redirect(output: Path) -> None:
    """Send all that is printed here, by C code too, to the end of a file."""
    _flush()
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        target = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    logging.raiseExceptions = False  # a job may have closed the streams
    faulthandler.enable()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # none, or closed by a job
            continue


def _end_with_parent(mark: str) -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        stop_tree(os.getpid(), mark)
        os._exit(1)
