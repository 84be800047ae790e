"""Files written whole or not at all, locks that end with their process, and reading of regular files only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EFBIG, EINVAL, ENOENT
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A new file beside ``path`` to write to; at the end it is synced and renamed, on an error removed.

    Args:
        path: The file to be; replaced where it exists.
        private: Only its owner may read it; otherwise whoever may read other new files.

    Raises:
        OSError: The folder cannot be written.
    """
    temporary = path.with_name(f"{_beside(path)}{os.urandom(4).hex()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        os.close(handle)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> str:
    return f".{path.name[:200]}."


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of a file beside it; only while no other one can be at work on it."""
    for other in list(path.parent.iterdir()):
        if other.name.startswith(_beside(path)):
            other.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write bytes to a file as `whole_file` does."""
    with whole_file(path, private=private) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Raises:
        OSError: It is none: a pipe would let its reader wait, and a device might never end.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except ValueError as error:  # a null byte
        raise OSError(EINVAL, "No path of a file") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(EINVAL, "Not a regular file")
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb", buffering=0)


def read_file(path: str | Path, limit: int) -> bytes:
    """Read a whole regular file.

    Raises:
        OSError: It cannot be read, is no regular file, or has more than ``limit`` bytes.
    """
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(EFBIG, f"File too large, of more than {limit} bytes")
        parts = bytearray()
        while part := file.read(limit + 1 - len(parts)):  # it may grow meanwhile
            parts += part
    if len(parts) > limit:
        raise OSError(EFBIG, f"File too large, of more than {limit} bytes")
    return bytes(parts)


@contextmanager
def only_one(path: Path, wait: float = 0) -> Iterator[None]:
    """Hold a lock beside a path while it is worked on; the lock ends with the process, however that ends.

    Args:
        path: What is worked on.
        wait: Seconds to wait for another process to let go of it.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The folder cannot be written.
    """
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():  # which the lock would make
        raise FileNotFoundError(ENOENT, "No such folder", str(path.parent))
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=wait, poll_interval=0.02)
    except Timeout:
        raise BlockingIOError(f"another process is at work on {path}") from None
    try:
        yield
    finally:
        with suppress(
            OSError
        ):  # while it is held: who opened it meanwhile sees that it is gone, and tries again
            Path(lock.lock_file).unlink()
        lock.release()
