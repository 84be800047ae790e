"""Distances between the distribution of each row of a matrix and that of all its entries.

Entries are rounded to half precision first: their 65536 levels are sorted by their bits, and what is asked
of the distribution of all entries is a look-up in a table. Distribution functions so change by the share of
entries in one level, at most 0.0003 for normal ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

LEVELS = 2**16
ROUNDING = 1e-12
"""Squared energy distance that is but a rounding error."""
CHUNK = 2**17
"""Entries worked on at once; few enough to stay in a processor's cache."""


@dataclass(frozen=True, eq=False)
class Distances:
    """One number a row, ``(rows,)`` each.

    Attributes:
        ks: Kolmogorov and Smirnov's: the largest difference between the distribution functions.
        ad: Anderson and Darling's A², with the distribution of all entries, at mid ranks, for the reference.
        energy: Energy distance (Székely and Rizzo), in the units of the entries.
    """

    ks: Values
    ad: Values
    energy: Values


def distances(rows: NDArray[np.float32]) -> Distances:
    """Compare each row to all entries, its own among them.

    Args:
        rows: ``(rows, entries)``, of root mean square 1 or so.
    """
    height, entries = rows.shape
    codes = encode(rows)
    counts = np.bincount(codes.ravel(), minlength=LEVELS)
    values = decode(np.arange(LEVELS, dtype=np.uint16))
    values[~np.isfinite(values)] = 0  # no entry has these levels
    upto = np.cumsum(counts) / rows.size
    below = upto - counts / rows.size
    middle = np.clip((below + upto) / 2, 0.5 / rows.size, 1 - 0.5 / rows.size)
    log, log1m = np.log(middle), np.log1p(-middle)
    gaps = _mean_gaps(values, counts / rows.size)
    own = float(gaps @ counts) / rows.size

    found = Distances(*(np.empty(height) for _ in range(3)))
    steps = np.arange(entries + 1) / entries
    odd = steps[1:] + steps[:-1]
    step = max(1, CHUNK // entries)
    for first in range(0, height, step):
        chunk = slice(first, first + step)
        # Sorting by radix is as fast with any processor.
        ascending = np.sort(codes[chunk], axis=1, kind="stable")
        ahead = (steps[1:] - upto.take(ascending)).max(axis=1)
        behind = (below.take(ascending) - steps[:-1]).max(axis=1)
        found.ks[chunk] = np.maximum(ahead, behind)
        found.ad[chunk] = -entries - log.take(ascending) @ odd - log1m.take(ascending) @ odd[::-1]
        within = values.take(ascending) @ (2 * odd - 2) / entries  # mean distance of the row's own entries
        energy = 2 * gaps.take(ascending).mean(axis=1) - within - own
        found.energy[chunk] = np.sqrt(np.where(energy > ROUNDING, energy, 0))
    return found


def encode(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to half precision, as integers in the order of the values; zeros of both signs are one."""
    bits = (values + np.float32(0)).astype(np.float16).view(np.int16)
    return (bits ^ ((bits >> 15) & 0x7FFF)).view(np.uint16) ^ np.uint16(0x8000)


def decode(codes: NDArray[np.uint16]) -> Values:
    """What `encode` rounded to."""
    bits = (codes ^ np.uint16(0x8000)).view(np.int16)
    return (bits ^ ((bits >> 15) & 0x7FFF)).view(np.float16).astype(np.float64)


def _mean_gaps(values: Values, shares: Values) -> Values:
    """Mean distance of each of some values, in ascending order, to all, of which each has a share."""
    below = np.cumsum(shares)
    sums = np.cumsum(shares * values)
    gaps: Values = values * (2 * below - 1) + sums[-1] - 2 * sums
    return gaps
