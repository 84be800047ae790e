"""A folder that is made file by file, and has its name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from deepenc.errors import CheckpointError, DeepencError

_RECORD: Final = "deepenc-run.json"
_LOCK: Final = "deepenc-run.lock"
_OPEN: Final = ".part"


class Partial:
    """Work on a folder, in a hidden one beside it: ``.NAME.partial``.

    A file that is finished is on disk before it gets its name, and is kept when the work is interrupted;
    the same run, started again, finds it. Another run starts anew. On a `DeepencError` nothing is kept,
    unless the folder was ``complete`` by then.

    Args:
        target: The folder to be; must not exist, or be empty.
        run: Tells one run from another: contents of finished files depend on nothing else.
        replace: Whether a target that has files is replaced, at the end.

    Raises:
        CheckpointError: The target is in use, another process is at work on it, or the disk cannot be
            written.
    """

    def __init__(self, target: Path, run: str, *, replace: bool = False) -> None:
        self.target, self.folder = target, partial_of(target)
        self._run, self._replace = run, replace
        self._done: dict[str, dict[str, str]] = {}
        self._pending: list[Future[None]] = []
        self.complete = False

    def __enter__(self) -> Self:
        refuse_used(self.target, self._replace)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._guard = (self.folder / _LOCK).open("w")
        try:
            self._only_one()
            self._resume()
        except BaseException:
            self._guard.close()
            raise
        self._finisher = ThreadPoolExecutor(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finisher.shutdown(wait=True)
        if isinstance(error, DeepencError) and not self.complete:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._guard.close()

    def _only_one(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is at work on {self.target}; wait for it, or give another folder"
            ) from None

    def _resume(self) -> None:
        """Find what a run of before finished; throw away what is not of this one."""
        try:
            record = json.loads((self.folder / _RECORD).read_bytes())
            if record["run"] == self._run:
                self._done = dict(record["done"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no run, or cut off while it began: nothing of it counts
        for path in self.folder.iterdir():
            if path.name not in {_LOCK, *self._done}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._record()

    def _record(self) -> None:
        text = json.dumps({"run": self._run, "done": self._done})
        temporary = self.folder / (_RECORD + _OPEN)
        temporary.write_text(text)
        os.replace(temporary, self.folder / _RECORD)

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
        _sync(self.path(name))
        os.replace(self.path(name), self.folder / name)
        self._done[name] = notes
        self._record()

    def wait(self) -> None:
        """Wait until all files are finished."""
        for pending in self._pending:
            pending.result()
        self._pending.clear()

    def release(self) -> None:
        """Give the folder its name."""
        self.wait()
        for path in self.folder.iterdir():
            _sync(path)
        _sync(self.folder)
        old = self.target.with_name(f".{self.target.name}.{os.urandom(4).hex()}.old")
        if used := self.target.exists() and self._replace:
            self.target.rename(old)
        try:
            os.replace(self.folder, self.target)
        except OSError:
            if used:
                old.rename(self.target)
            raise
        for name in (_RECORD, _LOCK):
            (self.target / name).unlink()
        _sync(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """The hidden folder in which a folder is made."""
    return target.parent / f".{target.name}.partial"


def refuse_used(target: Path, replace: bool = False) -> None:
    """Raise CheckpointError where a folder to be written has files already."""
    if not target.name:
        raise CheckpointError(f"expected a folder with a name to write to, got {str(target)!r}")
    if (
        target.exists()
        and not (replace and target.is_dir())
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise CheckpointError(f"{target} exists already; remove it, or give a folder that does not")


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
