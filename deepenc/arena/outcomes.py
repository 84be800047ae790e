"""What became of each of the judge's examples, packed into a line of text.

An outcome is a few numbers: 1 where a class was right, a mean over tokens, or what a measure over the whole
set needs of one example. Zeros and ones take a bit each; other numbers 2 bytes where half precision holds
them exactly, else 4.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from deepenc.errors import StoreError
from deepenc.tasks.task import Outcome


def pack(outcomes: Sequence[Outcome]) -> str:
    """Outcomes, in the order of the examples, as text.

    Args:
        outcomes: One an example, finite; they may differ in length.

    >>> unpack(pack([np.array([1.0]), np.array([0.0])]))
    [array([1.]), array([0.])]
    """
    lengths = [len(outcome) for outcome in outcomes]
    values = np.concatenate([np.asarray(outcome, dtype=np.float64) for outcome in outcomes] or [np.zeros(0)])
    if np.isin(values, (0.0, 1.0)).all():
        kind, data = "bits", np.packbits(values.astype(np.uint8)).tobytes()
    elif (values.astype(np.float16).astype(np.float64) == values).all():
        kind, data = "half", values.astype("<f2").tobytes()
    else:
        kind, data = "single", values.astype("<f4").tobytes()
    shape = [len(lengths), lengths[0]] if len(set(lengths)) == 1 else lengths
    head = json.dumps({"kind": kind, "even": len(set(lengths)) == 1, "shape": shape})
    return base64.b85encode(zlib.compress(head.encode() + b"\n" + data, 9)).decode()


def unpack(text: str) -> list[Outcome]:
    """What `pack` packed.

    Raises:
        StoreError: It packed something else.
    """
    lengths, values = _read(text)
    return np.split(values, np.cumsum(lengths)[:-1]) if lengths else []


@lru_cache(maxsize=256)
def first_numbers(text: str) -> Outcome | None:
    """First number of each outcome, ``(examples,)``, not to be written to; None where they differ in length.

    Raises:
        StoreError: As for `unpack`.
    """
    lengths, values = _read(text)
    if not lengths or len(set(lengths)) > 1 or not lengths[0]:
        return None
    found = values.reshape(len(lengths), -1)[:, 0].copy()
    found.flags.writeable = False
    return found


def _read(text: str) -> tuple[list[int], Outcome]:
    """Length of each outcome, and all their numbers."""
    try:
        head, data = zlib.decompress(base64.b85decode(text)).split(b"\n", 1)
        told = json.loads(head)
        shape = told["shape"]
        lengths = [shape[1]] * shape[0] if told["even"] else shape
        total = sum(lengths)
        if told["kind"] == "bits":
            values = np.unpackbits(np.frombuffer(data, np.uint8), count=total).astype(np.float64)
        else:
            dtype = {"half": "<f2", "single": "<f4"}[told["kind"]]
            values = np.frombuffer(data, dtype).astype(np.float64)
        if len(values) != total:
            raise ValueError(f"{len(values)} numbers for {total}")
    except (ValueError, KeyError, IndexError, TypeError, zlib.error) as error:
        raise StoreError(f"outcomes of a record cannot be read ({error}); measure its cell again") from error
    return lengths, values
