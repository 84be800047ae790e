"""The file of a study: a line of JSON for every change, as Optuna writes it; no torn write spoils it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from deepenc.errors import StoreError

log = logging.getLogger(__name__)


class Journal(BaseJournalBackend):
    """Optuna's journal in a folder that is locked: it needs no lock of its own, which a kill could leave.

    Whatever a write that was cut off has left behind the last whole line is removed when it is opened.

    Args:
        path: Of the file; made where missing.

    Raises:
        StoreError: It cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._starts = [0]
        """Where each line begins that was read, and the next one."""
        self._reading = 0
        try:
            if path.exists() and not path.is_file():
                raise StoreError(f"{path} is not a file; remove it, or choose another folder")
            self._remove_torn_end()
        except OSError as error:
            raise StoreError(f"cannot use {path}: {error.strerror}; choose another folder") from error

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """All lines from a number on.

        Raises:
            StoreError: One of them is no JSON, or the file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._starts[log_number_from])
                for number, line in enumerate(file, start=log_number_from):
                    self._reading = number
                    if number + 1 == len(self._starts):
                        self._starts.append(self._starts[number] + len(line))
                    yield json.loads(line)
        except OSError as error:
            raise StoreError(f"cannot read {self._path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise self.damaged(error) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines, all or none.

        Raises:
            StoreError: They cannot be written.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        size = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):  # where not even that is possible, the next command does it
                os.truncate(self._path, size)
            raise StoreError(
                f"cannot write to {self._path}: {error.strerror}; what was stored before is kept: make room, "
                "and give the same command to go on"
            ) from error

    def damaged(self, error: Exception) -> StoreError:
        """What to raise when the line that was read last makes no sense."""
        line, said = self._reading + 1, str(error).partition("\n")[0][:100]
        remedy = f"cut it back to the {line - 1} lines before it, " if line > 1 else ""
        return StoreError(
            f"{self._path}: line {line} is damaged ({type(error).__name__}: {said}); "
            f"bring back a copy of the file, {remedy}or choose another folder with --out"
        )

    def _remove_torn_end(self) -> None:
        """Cut the file behind its last line that is whole and JSON; Optuna's own lock goes, too."""
        lock = Path(f"{self._path}.lock")
        if lock.is_symlink():  # another version of deepenc was killed while it wrote
            lock.unlink()
        with self._path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            whole = last = 0
            content = b""
            for line in file:
                if line.endswith(b"\n"):
                    last, whole, content = whole, whole + len(line), line
            if content and not _is_json(content):  # a line that was written behind one that was cut off
                whole = last
            if whole < size:
                log.warning("%s: removed %d bytes of a write that was cut off", self._path, size - whole)
                file.truncate(whole)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
