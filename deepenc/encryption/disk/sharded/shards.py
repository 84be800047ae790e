"""Folders of safetensors files as Hugging Face's libraries write them: read and written tensor by tensor.

The files are read as files, not mapped: mapped pages count as memory of the process that read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepenc.errors import CheckpointError
from deepenc.files import open_file, read_file

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CHUNK: Final = 2**23
"""Bytes that are read, changed and written at a time."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_JSON = 2**27
_AHEAD = 2**26
_POINTER = b"version https://git-lfs"
_REMEDY = "restore the checkpoint from its original"


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its shape.
        start: Where in the file its bytes begin; 0 where it is not in a file yet.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def meta(self) -> Tensor:
        """A tensor of its shape and type, without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        path: Where it is.
        entries: Its tensors, in the order of their bytes.
        metadata: What else its header says.
    """

    path: Path
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def aliases(self) -> dict[str, str]:
        """Further names of tied tensors -> the name under which the file has them."""
        names = {entry.name for entry in self.entries}
        return {alias: name for alias, name in self.metadata.items() if name in names and alias not in names}


@dataclass(frozen=True)
class Shards:
    """All files of a checkpoint.

    Attributes:
        files: In the order of their names.
        index: Metadata of the index; None where there is one file and no index.
    """

    files: tuple[Shard, ...]
    index: Mapping[str, Any] | None

    def entries(self) -> dict[str, Entry]:
        """All tensors by name."""
        return {entry.name: entry for shard in self.files for entry in shard.entries}

    def aliases(self) -> dict[str, str]:
        """Further names of tied tensors -> the name under which a file has them."""
        own = self.entries()
        found = {alias: name for shard in self.files for alias, name in shard.aliases().items()}
        return {alias: name for alias, name in found.items() if alias not in own}


def open_shards(folder: Path) -> Shards:
    """Read the index and the headers of a checkpoint's files; no tensor is read.

    Args:
        folder: With ``model.safetensors``, or with ``model.safetensors.index.json`` and what it names.

    Raises:
        CheckpointError: A file is missing, cut or altered, the index does not agree with the files or names
            one outside the folder, or a tensor's type is unknown.
    """
    single, several = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single and several:
        raise CheckpointError(
            f"{folder} has both {SINGLE} and {INDEX}, which may hold other weights; remove the one that is "
            "out of date (transformers reads the first), and the files that the second names"
        )
    if not several:
        if not single:
            others = sorted(path.name for path in folder.glob("model.*safetensors*"))
            variant = f"; there is {others[0]}: save it without a variant, or rename it" if others else ""
            raise CheckpointError(
                f"{folder} has neither {INDEX} nor {SINGLE}; give the folder of a checkpoint in safetensors "
                f"files, as save_pretrained writes them{variant}"
            )
        return Shards((_open(folder / SINGLE),), None)
    index = read_json(folder / INDEX)
    places = index.get("weight_map")
    metadata = index.get("metadata") or {}
    if not isinstance(places, dict) or not places or not isinstance(metadata, dict):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensors to files; {_REMEDY}")
    for name, file in places.items():
        if not _is_shard(file):
            raise CheckpointError(
                f"{folder / INDEX} says that tensor {name!r} is in {file!r}: expected the name of a "
                f".safetensors file in the same folder; {_REMEDY}"
            )
    files = tuple(_open(folder / file) for file in sorted(set(places.values())))
    found: dict[str, str] = {}
    for shard in files:
        for entry in shard.entries:
            if entry.name in found or places.get(entry.name) != shard.path.name:
                raise CheckpointError(
                    f"{shard.path} has tensor {entry.name!r}, which {INDEX} says is in "
                    f"{places.get(entry.name)!r}; {_REMEDY}"
                )
            found[entry.name] = shard.path.name
    if missing := sorted(set(places) - set(found)):
        raise CheckpointError(
            f"{folder / places[missing[0]]} lacks {len(missing)} tensors that {INDEX} says are in it, "
            f"such as {missing[0]!r}; {_REMEDY}"
        )
    return Shards(files, metadata)


def files_of(folder: Path) -> set[str]:
    """Names of the files in which a checkpoint's tensors are, and of their index; whichever are there."""
    names = {SINGLE, INDEX}
    with suppress(CheckpointError):
        places = read_json(folder / INDEX).get("weight_map")
        names |= {n for n in (places.values() if isinstance(places, dict) else ()) if _is_shard(n)}
    return {name for name in names if (folder / name).is_file()}


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        CheckpointError: It cannot be read, or holds none.
    """
    try:
        document = json.loads(read_file(path, _MAX_JSON))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is cut or altered: expected a JSON object; {_REMEDY}")
    return document


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that holds no tensors, which says so where it stands for another one."""
    with suppress(OSError), open_file(path) as file:
        if file.read(len(_POINTER)) == _POINTER:
            return CheckpointError(
                f"{path} is a pointer of Git LFS to the file with the tensors; fetch that: git lfs pull"
            )
    return CheckpointError(f"cannot read the tensors in {path}: {error}; {_REMEDY}")


def _open(path: Path) -> Shard:
    try:
        with open_file(path) as raw:
            with safe_open(path, framework="pt") as file:  # checks sizes, offsets and shapes against the file
                metadata = file.metadata() or {}
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    header.pop("__metadata__", None)
    entries = []
    for name, about in header.items():
        dtype = _DTYPES.get(about["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: tensor {name!r} is of type {about['dtype']}, expected one of {', '.join(_DTYPES)}; "
                "store it as one of these or, if it is quantised, give the checkpoint from before that"
            )
        entries.append(Entry(name, dtype, tuple(about["shape"]), 8 + size + about["data_offsets"][0]))
    return Shard(path, tuple(sorted(entries, key=lambda entry: entry.start)), metadata)


class Reader:
    """Reads the tensors of one file, from front to back.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = open_file(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
        """Read a tensor, or its entries ``[start, stop)`` along the first dimension.

        Raises:
            CheckpointError: The file ends before it.
        """
        start, shape = entry.start, entry.shape
        if rows is not None:
            start += rows[0] * (entry.nbytes // max(1, shape[0]))
            shape = (rows[1] - rows[0], *shape[1:])
        size = prod(shape) * entry.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=entry.dtype)
        data = np.empty(size, dtype=np.uint8)  # numpy asks for large pages, torch does not
        view = data.data
        self._file.seek(start)
        done = 0
        while done < size:
            count = self._file.readinto(view[done : done + 2**26])
            if not count:
                raise CheckpointError(f"{self.path} ends inside tensor {entry.name!r}; {_REMEDY}")
            done += count
        if hasattr(os, "posix_fadvise"):  # the disk reads on while these bytes are worked on
            os.posix_fadvise(self._file.fileno(), start + size, _AHEAD, os.POSIX_FADV_WILLNEED)
        return torch.from_numpy(data).view(entry.dtype).reshape(shape)

    def blocks(self, entry: Entry) -> Iterator[Tensor]:
        """Read a tensor in pieces along its first dimension."""
        if not entry.shape:
            yield self.read(entry)
        for rows in steps(entry):
            yield self.read(entry, rows)


def steps(entry: Entry) -> Iterator[tuple[int, int]]:
    """Ranges along the first dimension of a tensor that take about `CHUNK` bytes each; none for a scalar."""
    if entry.shape and entry.nbytes:
        step = max(1, CHUNK * entry.shape[0] // entry.nbytes)
        for start in range(0, entry.shape[0], step):
            yield start, min(start + step, entry.shape[0])


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def header_of(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """What stands in a safetensors file before the bytes of its tensors, which follow in this order."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        ends = [offset, offset + entry.nbytes]
        document[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": ends,
        }
        offset = ends[1]
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
