"""Combinations as integers: which of all the ways to choose positions, counted from 0."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from deepenc.errors import ConfigError


def rank(positions: Sequence[int], total: int) -> int:
    """Rank of a combination in colexicographic order, in ``[0, comb(total, len(positions)))``.

    Args:
        positions: Ascending and distinct, in ``[0, total)``.
        total: Number of positions to choose from.

    >>> [rank(p, 3) for p in [(0, 1), (0, 2), (1, 2)]]
    [0, 1, 2]
    """
    result = 0
    n, k = total - 1, len(positions)
    ways = comb(n, k) if n >= 0 else 0
    for position in reversed(positions):
        while n > position:
            ways = ways * (n - k) // n  # comb(n - 1, k) from comb(n, k)
            n -= 1
        result += ways
        if n:
            ways = ways * k // n  # comb(n - 1, k - 1)
        n, k = n - 1, k - 1
    return result


def unrank(number: int, total: int, count: int) -> tuple[int, ...]:
    """The combination of a rank; the inverse of `rank`.

    Args:
        number: In ``[0, comb(total, count))``.
        total: Number of positions to choose from.
        count: Number of positions chosen.

    Returns:
        Ascending positions in ``[0, total)``.

    Raises:
        ConfigError: The number is no rank of such a combination.
    """
    if not 0 <= count <= total or not 0 <= number < comb(total, count):
        # A rank may have more digits than Python prints.
        size = f"a number of {number.bit_length()} bits" if number >= 0 else "a negative number"
        raise ConfigError(f"expected the rank of {count} positions among {total}, got {size}")
    positions = []
    n, k = total - 1, count
    ways = comb(n, k) if n >= 0 else 0
    while k:
        while ways > number:
            ways = ways * (n - k) // n
            n -= 1
        positions.append(n)
        number -= ways
        if n:
            ways = ways * k // n
        n, k = n - 1, k - 1
    return tuple(reversed(positions))
