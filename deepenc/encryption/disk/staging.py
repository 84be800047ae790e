"""A folder, and a key beside it, that take their places together when both are whole.

They are made in ``.NAME.partial`` beside the folder and in ``.KEY.new`` beside the key. One rename, to
``.NAME.ready``, decides: until then the old folder and key are untouched, from then on the new ones take
their places, at the latest when the folder is next read or written (`finish`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from deepenc.errors import CheckpointError
from deepenc.files import only_one, read_file, remove_leftovers, sync, write_whole

_NOTE: Final = "deepenc-moves.json"
_LATER: Final = "deepenc-moves-later.json"
"""What the note is called when the key has its place, so that nobody asks for it again."""

_MAX_FILE: Final = 2**26


@dataclass(frozen=True)
class Staged:
    """A file that waits beside the one that it will replace."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """What was written to ``waiting(path)``, to take the place of ``path``.

        Raises:
            OSError: It cannot be read.
        """
        data = read_file(waiting(path), _MAX_FILE)
        return cls(Path(os.path.abspath(path)), hashlib.sha256(data).hexdigest())

    def place(self) -> bool:
        """Give the file its name, if it has not got it yet; False where it is gone."""
        for path in (waiting(self.path), self.path):
            if path.exists() and hashlib.sha256(read_file(path, _MAX_FILE)).hexdigest() == self.digest:
                os.replace(path, self.path)
                sync(self.path.parent)
                return True
        return False


class Staging:
    """Work on a folder, in a hidden one beside it.

    Args:
        target: The folder to be; must not exist, or be empty.
        replace: Whether a target that has files gets these files instead, at the end.

    Raises:
        CheckpointError: The target is in use, or another process is at work on it.
        OSError: The disk cannot be written.
    """

    scratch: ClassVar[frozenset[str]] = frozenset()
    """Names of files that serve the work alone."""

    def __init__(self, target: Path, *, replace: bool = False) -> None:
        self.target, self.folder = target, partial_of(target)
        self._replace = replace
        self._held = ExitStack()

    def __enter__(self) -> Self:
        finish(self.target)
        refuse_used(self.target, self._replace)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(only_one(_real(self.target)))
        except BlockingIOError:
            raise CheckpointError(
                f"another process is at work on {self.target}; wait for it, or give another folder"
            ) from None
        try:
            self.folder.mkdir(exist_ok=True)
            self.begin()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.discards(error):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def begin(self) -> None:
        """Make room: throw away what a run that was interrupted left."""
        self.clear(())

    def clear(self, kept: Collection[str]) -> None:
        """Remove everything from the hidden folder but some files."""
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def discards(self, error: BaseException | None) -> bool:
        """Whether the unfinished work is thrown away after an error."""
        return error is not None

    def release(self, key: Staged | None = None, drop: Collection[str] = ()) -> None:
        """Give the folder its name, and a key its place.

        Args:
            key: The key.
            drop: Names of files in the old folder that go even where no new ones have their names.

        Raises:
            CheckpointError: A new file has the name of a folder in the old one, or the old one is on another
                disk than its parent.
        """
        names = {path.name for path in self.folder.iterdir()} - self.scratch
        if self.target.exists():
            if folders := sorted(name for name in names if (self.target / name).is_dir()):
                raise CheckpointError(f"{self.target / folders[0]} is a folder; move it away")
            if self.target.stat().st_dev != self.folder.stat().st_dev:
                raise CheckpointError(f"{self.target} is a disk of its own; give a folder inside it")
        note: dict[str, Any] = {"drop": sorted(set(drop) - names)}
        if key is not None:
            note["key"] = [str(key.path), key.digest]
        write_whole(self.folder / _NOTE, json.dumps(note).encode())
        for name in self.scratch:
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            sync(path)
        sync(self.folder)
        os.replace(self.folder, _ready(self.target))
        sync(self.folder.parent)
        _complete(self.target)


def finish(target: Path) -> bool:
    """Complete the replacement of a folder and its key that was interrupted, if one was.

    Returns:
        Whether there was one.

    Raises:
        CheckpointError: It cannot be completed now.
    """
    if not _ready(target).is_dir():
        return False
    try:
        with only_one(_real(target), wait=60):
            return _complete(target)
    except OSError as error:
        raise CheckpointError(
            f"the replacement of {target} was interrupted, and cannot be completed from {_ready(target)}: "
            f"{error}; make both folders writable"
        ) from error


def _complete(target: Path) -> bool:
    """Do what a note says; each step may have been done before."""
    ready = _ready(target)
    if not ready.is_dir():
        return False
    if (ready / _NOTE).exists():
        if key := _read_note(ready / _NOTE).get("key"):
            staged = Staged(Path(key[0]), key[1])
            if not staged.path.parent.is_dir():
                raise CheckpointError(
                    f"{ready} waits for its key to be placed at {staged.path}, whose folder is not there; "
                    "bring it back"
                )
            if not staged.place():  # a network without its key is worth nothing: the old ones stay
                shutil.rmtree(ready)
                return True
        os.replace(ready / _NOTE, ready / _LATER)
    if target.exists():
        if (ready / _LATER).exists():
            for name in _read_note(ready / _LATER)["drop"]:
                (target / name).unlink(missing_ok=True)
        for path in ready.iterdir():
            if path.name != _LATER:
                os.replace(path, target / path.name)
        sync(target)
        shutil.rmtree(ready)
    else:
        (ready / _LATER).unlink(missing_ok=True)
        os.replace(ready, _real(target))
    sync(ready.parent)
    return True


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(read_file(path, _MAX_FILE))
        key, drop = note.get("key", ["", ""]), note["drop"]
        texts = [*key, *drop]
        plain = all(type(t) is str for t in texts) and all(Path(n).name == n not in ("", "..") for n in drop)
        if len(key) == 2 and plain:
            return dict(note)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path} was altered; remove {path.parent}")


def discard(path: Path, target: Path) -> None:
    """Remove what waits beside a file, unless a folder that is whole waits for it."""
    if not _ready(target).is_dir():
        waiting(path).unlink(missing_ok=True)
        remove_leftovers(waiting(path))


def partial_of(target: Path) -> Path:
    """The hidden folder in which a folder is made."""
    return _hidden(target, "partial")


def _ready(target: Path) -> Path:
    return _hidden(target, "ready")


def waiting(path: Path) -> Path:
    """The file beside another one that waits to replace it."""
    return path.with_name(f".{path.name}.new")


def _hidden(target: Path, what: str) -> Path:
    real = _real(target)
    return real.parent / f".{real.name}.{what}"


def _real(target: Path) -> Path:
    """Where a folder is, links followed: what is hidden beside it must lie on the same disk."""
    return Path(os.path.realpath(target))


def refuse_used(target: Path, replace: bool = False) -> None:
    """Raise CheckpointError where a folder to be written has files already, or is something else."""
    if not target.name:
        raise CheckpointError(f"expected a folder with a name to write to, got {str(target)!r}")
    used = any(target.iterdir()) if target.is_dir() else os.path.lexists(target)
    if used and not (replace and target.is_dir()):
        raise CheckpointError(f"{target} exists already; remove it, or give a folder that does not")
