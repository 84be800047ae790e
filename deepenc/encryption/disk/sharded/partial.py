"""A folder that is made file by file: what is finished outlasts an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final

from deepenc.encryption.disk.staging import Staged, Staging
from deepenc.errors import DeepencError
from deepenc.files import read_file, sync, write_whole

_RECORD: Final = "deepenc-run.json"
_OPEN: Final = ".part"


class Partial(Staging):
    """A staged folder whose files are finished one by one.

    A file that is finished is on disk before it gets its name, and is kept when the work is interrupted;
    the same run, started again, finds it. Another run starts from the beginning. On a `DeepencError` nothing
    is kept, unless the folder was ``complete`` by then.

    Args:
        target: The folder to be; must not exist, or be empty.
        run: Tells one run from another: contents of finished files depend on nothing else.
        replace: Whether a target that has files gets these instead, at the end.

    Raises:
        CheckpointError: The target is in use, or another process is at work on it.
        OSError: The disk cannot be written.
    """

    scratch: ClassVar[frozenset[str]] = frozenset({_RECORD})

    def __init__(self, target: Path, run: str, *, replace: bool = False) -> None:
        super().__init__(target, replace=replace)
        self._run = run
        self._done: dict[str, dict[str, str]] = {}
        self._pending: list[Future[None]] = []
        self._finisher = ThreadPoolExecutor(1)
        self.complete = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finisher.shutdown(wait=True)
        super().__exit__(kind, error, trace)

    def discards(self, error: BaseException | None) -> bool:
        """See `Staging.discards`."""
        return isinstance(error, DeepencError) and not self.complete

    def begin(self) -> None:
        """Find what an interrupted run finished; throw away what is not of this one."""
        try:
            record = json.loads(read_file(self.folder / _RECORD, 2**27))
            if record["run"] == self._run:
                self._done = dict(record["done"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # no run, or cut off while it began: nothing of it counts
        self.clear(self._done)
        self._record()

    def _record(self) -> None:
        write_whole(self.folder / _RECORD, json.dumps({"run": self._run, "done": self._done}).encode())

    def finished(self, name: str, size: int) -> Mapping[str, str] | None:
        """What was noted with a file when it was finished, if it was, and still has its size."""
        path = self.folder / name
        if name in self._done and path.is_file() and path.stat().st_size == size:
            return self._done[name]
        return None

    def path(self, name: str) -> Path:
        """Where to write a file until it is finished."""
        return self.folder / (name + _OPEN)

    def finish(self, name: str, notes: Mapping[str, str]) -> None:
        """Bring a file onto the disk and give it its name, while the caller goes on with the next.

        Args:
            name: The file's name.
            notes: What `finished` is to tell of it.
        """
        self._pending.append(self._finisher.submit(self._finish, name, dict(notes)))

    def _finish(self, name: str, notes: dict[str, str]) -> None:
        sync(self.path(name))
        os.replace(self.path(name), self.folder / name)
        self._done[name] = notes
        self._record()

    def wait(self) -> None:
        """Wait until all files are finished."""
        for pending in self._pending:
            pending.result()
        self._pending.clear()

    def release(self, key: Staged | None = None, drop: Collection[str] = ()) -> None:
        """See `Staging.release`; all files are finished first."""
        self.wait()
        super().release(key, drop)
