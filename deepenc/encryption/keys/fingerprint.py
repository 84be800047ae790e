"""What identifies encrypted tensors, so that a key opens its own network and no other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from deepenc.encryption.tensors import shared


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors: names, dtypes, shapes, bytes, and which are tied; 64 hex digits.

    Each tensor is hashed by itself, on several cores, and the digests together once more. Of tied tensors
    one name alone may be in a site: untied, though equal, they would not decrypt to the victim.
    """
    names = sorted(tensors)
    ordered = [tensors[name] for name in names]
    large = sum(tensor.numel() for tensor in ordered) > 2**20  # to start threads takes longer than less
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(
            zip(names, pool.map(_digest, ordered) if large else map(_digest, ordered), strict=True)
        )
    entries = {name: (tensor.dtype, tensor.shape, digests[name]) for name, tensor in tensors.items()}
    return combined(entries, [group for group in shared(tensors) if len(group) > 1])


def combined(
    entries: Mapping[str, tuple[torch.dtype, Sequence[int], str]], tied: Iterable[Sequence[str]]
) -> str:
    """The fingerprint, from what is known of each tensor.

    Args:
        entries: Name -> dtype, shape, and SHA-256 of the bytes in hex.
        tied: Groups of two or more names that stand for one tensor that is not empty.
    """
    document: list[list[object]] = [
        [name, str(dtype), list(shape), digest] for name, (dtype, shape, digest) in sorted(entries.items())
    ]
    document += sorted(["tied", *sorted(group)] for group in tied)
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
