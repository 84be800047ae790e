"""Rewriting a checkpoint's files, tensor by tensor: the same names, other shapes."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from errno import ENOSPC
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from torch import Tensor

from deepenc.encryption.disk.header import HEADER
from deepenc.encryption.disk.sharded.partial import Partial
from deepenc.encryption.disk.sharded.shards import INDEX, Entry, Reader, Shard, Shards, bytes_of, header_of
from deepenc.encryption.disk.sharded.streaming import Pieces, unchanged
from deepenc.encryption.keys.fingerprint import combined

_LOG = logging.getLogger(__name__)
_BESIDE: Final = {".json", ".txt", ".model", ".jinja", ".md"}
"""What is copied of the files beside the tensors. Anything else might hold the victim's weights, too."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in all."""


class Change(Protocol):
    """What is done to the tensors that have, or get, confusion entries.

    Attributes:
        encrypts: Whether what is written is encrypted, not what is read.
    """

    encrypts: ClassVar[bool]

    def grown(self, entry: Entry) -> Entry:
        """The entry with its new shape."""

    def pieces(self, reader: Reader, entry: Entry) -> Pieces:
        """Read a tensor, and change it."""


def rewrite(
    shards: Shards,
    change: Change,
    known: Mapping[str, str],
    ties: Mapping[str, str],
    place: Partial,
    progress: Progress | None,
) -> dict[str, tuple[Entry, str]]:
    """Write every file that is not finished yet.

    Args:
        shards: The files to read.
        change: What to do to the tensors in ``known``; others are copied.
        known: Names in the files -> the name that the change has for them.
        ties: Further names of tied tensors, for the files' metadata.
        place: Where to write.
        progress: Told of the progress.

    Returns:
        Every stored tensor, as it is in the encrypted files, with the SHA-256 of its bytes there.
    """
    plans = [_plan(shard, change, known, ties) for shard in shards.files]
    notes = [place.finished(plan.name, plan.size) for plan in plans]
    _need(sum(p.size for p, digests in zip(plans, notes, strict=True) if digests is None), place.folder)
    total = sum(entry.nbytes for entry in shards.entries().values())
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    result: dict[str, tuple[Entry, str]] = {}
    for shard, plan, digests in zip(shards.files, plans, notes, strict=True):
        if digests is None:
            with place.path(plan.name).open("wb", buffering=0) as file:
                _put(file, plan.header())
                digests = _stream(shard, change, known, file, told)
            place.finish(plan.name, digests)
        else:
            told(sum(entry.nbytes for entry in shard.entries))
        for before, after in zip(shard.entries, plan.entries, strict=True):
            result[before.name] = (after if change.encrypts else before, digests[before.name])
    place.wait()
    return result


@dataclass(frozen=True)
class _Plan:
    """A file to be written."""

    name: str
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]

    def header(self) -> bytes:
        return header_of(self.entries, self.metadata)

    @property
    def size(self) -> int:
        return len(self.header()) + sum(entry.nbytes for entry in self.entries)


def _need(size: int, folder: Path) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise OSError(ENOSPC, f"{size / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _plan(shard: Shard, change: Change, known: Mapping[str, str], ties: Mapping[str, str]) -> _Plan:
    entries = tuple(
        replace(change.grown(replace(entry, name=known[entry.name])), name=entry.name)
        if entry.name in known
        else entry
        for entry in shard.entries
    )
    own = {entry.name for entry in entries}
    aliases = {alias: name for alias, name in ties.items() if name in own}
    return _Plan(shard.path.name, entries, {**shard.metadata, **aliases})


def _stream(
    shard: Shard,
    change: Change,
    known: Mapping[str, str],
    file: FileIO,
    told: Callable[[int], None],
) -> dict[str, str]:
    """Write all tensors of a file; SHA-256 of each, as it is encrypted."""
    digests = {entry.name: hashlib.sha256() for entry in shard.entries}
    with Reader(shard.path) as reader, ThreadPoolExecutor(1) as behind:
        pending: deque[Future[None]] = deque()

        def finish(digest: Any, encrypted: Tensor, written: Tensor) -> None:
            digest.update(bytes_of(encrypted))
            _put(file, bytes_of(written))

        for entry in shard.entries:
            if entry.name in known:
                pieces = change.pieces(reader, replace(entry, name=known[entry.name]))
            else:
                pieces = unchanged(reader, entry)
            for encrypted, written in pieces:
                pending.append(behind.submit(finish, digests[entry.name], encrypted, written))
                if len(pending) > 3:
                    pending.popleft().result()
            told(entry.nbytes)
        for last in pending:
            last.result()
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _put(file: FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def fingerprint_of(written: Mapping[str, tuple[Entry, str]], ties: Mapping[str, str]) -> str:
    """The `fingerprint` of the tensors, from the digests of their bytes.

    Args:
        written: The stored tensors, from `rewrite`.
        ties: Further names of tied ones.
    """
    stored = dict(written) | {alias: written[name] for alias, name in ties.items()}
    groups: dict[str, list[str]] = {}
    for alias, name in ties.items():
        if written[name][0].nbytes:
            groups.setdefault(name, [name]).append(alias)
    entries = {name: (entry.dtype, entry.shape, digest) for name, (entry, digest) in stored.items()}
    return combined(entries, groups.values())


def write_index(shards: Shards, place: Partial, change: Change, known: Mapping[str, str]) -> None:
    """Write the index of the rewritten files, if there was one; arguments as for `rewrite`."""
    if shards.index is None:
        return
    before = list(shards.entries().values())
    after = [entry for shard in shards.files for entry in _plan(shard, change, known, {}).entries]
    metadata = {**shards.index, "total_size": sum(entry.nbytes for entry in after)}
    if isinstance(count := metadata.get("total_parameters"), int):
        metadata["total_parameters"] = count + _numbers(after) - _numbers(before)
    places = {entry.name: shard.path.name for shard in shards.files for entry in shard.entries}
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (place.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _numbers(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes // entry.dtype.itemsize for entry in entries)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and the like; never a file in which weights may be."""
    left = []
    for path in sorted(source.iterdir()):
        index = path.name.endswith(".index.json")
        if path.is_file() and path.suffix in _BESIDE and not index and path.name != HEADER:
            shutil.copyfile(path, folder / path.name)
        elif not index and path.suffix != ".safetensors" and path.name != HEADER:
            left.append(path.name)
    if left:
        _LOG.info("not copied from %s: %s", source, ", ".join(left))
