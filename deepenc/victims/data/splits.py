"""Splitting images into parts that never overlap, and telling weights and data apart by hash."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepenc import trees
from deepenc.errors import VictimError
from deepenc.tasks.examples import Examples

Index = NDArray[np.int64]


def digests(images: NDArray[np.generic]) -> list[bytes]:
    """SHA-256 of every image's pixels; ``images`` is ``(images, ...)``."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest() for image in images]


def split(ids: Sequence[bytes], sizes: Sequence[int]) -> list[Index]:
    """Share images out by their content.

    The order is that of the hashes, hence as good as random, yet the same on every machine and whatever
    the order of the files. Equal images stay together, so no part holds an image of another part.

    Args:
        ids: A hash per image; equal images have equal hashes.
        sizes: Images per part; a part is smaller where equal images did not fit.

    Returns:
        For each part, the indices of its images.

    Raises:
        VictimError: There are fewer images than asked for.

    >>> [part.tolist() for part in split([b"c", b"a", b"b", b"a"], [1, 2])]
    [[], [1, 3]]
    """
    if sum(sizes) > len(ids):
        raise VictimError(
            f"expected at least {sum(sizes)} images to split into {list(sizes)}, got {len(ids)}; add images"
        )
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    starts = [0] + [at for at in range(1, len(order)) if ids[order[at]] != ids[order[at - 1]]]
    cuts = np.array([*starts, len(order)])
    bounds = [0]
    for size in sizes:
        bounds.append(int(cuts[np.searchsorted(cuts, bounds[-1] + size, side="right") - 1]))
    return [np.array(order[a:b], dtype=np.int64) for a, b in itertools.pairwise(bounds)]


def shared(one: Examples, other: Examples) -> int:
    """How many of some examples have inputs that are among others', too, bit for bit.

    >>> first = Examples(torch.tensor([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]))
    >>> shared(first, Examples(torch.tensor([[3.0, 4.0], [1.0, 4.0]])))
    2
    """
    if not (one.stored and other.stored):
        known = set(other.digests())
        return sum(digest in known for digest in one.digests())
    first, second = one.inputs, other.inputs
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return _shared(first, second)
    known = set(other.digests())
    return sum(digest in known for digest in one.digests())


def _shared(one: Tensor, other: Tensor) -> int:
    if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
        return 0
    step = max(
        1, math.prod(one.shape[1:]) // 64
    )  # a few values tell nearly all apart; only the rest is read whole
    first, second = _rows(one, step), _rows(other, step)
    both = set(first) & set(second)
    alike = [torch.tensor([row in both for row in rows], dtype=torch.bool) for rows in (first, second)]
    known = set(_rows(other[alike[1]]))
    return sum(row in known for row in _rows(one[alike[0]]))


def _rows(inputs: Tensor, step: int = 1) -> list[bytes]:
    """A hash of each input, or of every so many of its values."""
    values = inputs.detach().cpu().unsqueeze(1).flatten(1)[:, ::step].contiguous()
    return digests(values.view(torch.uint8).numpy()) if values.numel() else [b""] * len(inputs)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors with their names, types and shapes, in any order."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def fingerprint(model: nn.Module, *parts: Examples) -> str:
    """SHA-256 (hex) of a network's weights and of examples with their targets.

    Of examples that are not in memory the inputs alone count, by their hashes.
    """
    told = [checksum({n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)})]
    for part in parts:
        if part.stored:
            leaves = trees.tensors(tuple(part.batch()))
            told.append(checksum({str(i): leaf for i, leaf in enumerate(leaves)}))
        else:
            told += [digest.hex() for digest in part.digests()]
    return hashlib.sha256(" ".join(told).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
