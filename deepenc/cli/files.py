"""Folders that commands write: nothing is replaced unasked, nothing is left half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepenc.errors import CheckpointError, ConfigError


def same(first: Any, second: Any) -> bool:
    """Whether two tensors are equal bit for bit, dtype included."""
    import torch

    return first.dtype == second.dtype and torch.equal(first, second)


def refuse_to_replace(path: Path, force: bool) -> None:
    """Raise ConfigError where something is there already, unless it may be replaced."""
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not force:
        raise ConfigError(f"{path} exists already; give another path, or --force to replace it")
    if taken and path.is_dir() and not (path / "deepenc.json").is_file():
        raise ConfigError(f"{path} holds something other than an encrypted network; give another path")


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Keep an old folder aside until a new one is complete; put it back where that fails."""
    aside = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.old")
    try:
        if folder.exists():
            folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"cannot replace {folder}: {error.strerror}; give another folder") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
