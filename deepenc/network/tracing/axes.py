"""Which dimensions of which tensors carry the same channels.

Every entry of every dimension of a parameter gets a label, a non-negative integer. Operators pass labels
on to their results and tie labels that must be the same channel; what cannot be widened is fixed, with a
reason. An axis is the label array of one dimension, or None where the dimension is fixed for a reason not
worth telling (batch, space, the network's own inputs). Negative labels stand for single fixed entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deepenc.network.sites import Role

Labels = NDArray[np.int64]
Axis = Labels | None


@dataclass(frozen=True)
class Owner:
    """A dimension of a parameter or buffer; its entries have the labels ``first`` to ``first + size - 1``."""

    tensor: str
    dim: int
    first: int
    size: int


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a traced network.

    Attributes:
        channel: Channel of each label, ``(labels,)``.
        owners: Dimensions of parameters and buffers, in the order in which the network first used them.
        roles: Role of an owner's entries, by (tensor, dim).
        reason: Channel -> why it cannot be widened.
        stream: Channels that additions of activations tie together.
        contracted: Channels over which activations are multiplied with one another.
    """

    channel: NDArray[np.int32]
    owners: tuple[Owner, ...]
    roles: dict[tuple[str, int], Role]
    reason: dict[int, str]
    stream: frozenset[int]
    contracted: frozenset[int]

    def of(self, owner: Owner) -> NDArray[np.int32]:
        """Channels along a dimension, ``(size,)``."""
        return self.channel[owner.first : owner.first + owner.size]


class Axes:
    """Hands out labels and collects what is tied and what is fixed."""

    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.roles: dict[tuple[str, int], Role] = {}
        self._count = 0
        self._ties: list[tuple[Labels, Labels]] = []
        self._additions: list[tuple[Labels, Labels]] = []
        self._fixes: list[tuple[Labels, str]] = []
        self._contracted: list[Labels] = []
        self._rigid: list[str] = []

    def own(self, tensor: str, dim: int, size: int) -> Labels:
        """Labels for a dimension of a parameter."""
        self.owners.append(Owner(tensor, dim, self._count, size))
        self._count += size
        return np.arange(self._count - size, self._count)

    def rigid(self, size: int, reason: str) -> Labels:
        """Labels for entries that cannot be widened, inside a dimension where others can."""
        self._rigid.append(reason)
        return np.full(size, -len(self._rigid))

    def fix(self, axis: Axis, reason: str) -> None:
        """Say that a dimension cannot be widened."""
        if axis is not None:
            self._fixes.append((axis[axis >= 0], reason))

    def tie(self, first: Axis, second: Axis, reason: str, *, addition: bool = False) -> Axis:
        """Say that two dimensions of one size carry the same channels.

        Args:
            first: An axis.
            second: Another.
            reason: Why the one cannot be widened if the other is fixed.
            addition: Whether an addition of activations ties them; where nothing else does, it makes a
                residual stream.

        Returns:
            An axis that stands for both.
        """
        if first is None or second is None:
            self.fix(first, reason)
            self.fix(second, reason)
            return None
        if first is not second:
            free = (first >= 0) & (second >= 0)
            (self._additions if addition else self._ties).append((first[free], second[free]))
            self.fix(np.where(second < 0, first, -1), reason)
            self.fix(np.where(first < 0, second, -1), reason)
        return first

    def contract(self, axis: Axis) -> None:
        """Say that activations are multiplied with one another over these channels."""
        if axis is not None:
            self._contracted.append(axis[axis >= 0])

    def role(self, axis: Axis, role: Role) -> None:
        """Say what a parameter's entries are to their channels; the first word counts."""
        if axis is None:
            return
        starts = np.array([owner.first for owner in self.owners])
        for index in np.unique(np.searchsorted(starts, axis[axis >= 0], side="right") - 1):
            owner = self.owners[int(index)]
            self.roles.setdefault((owner.tensor, owner.dim), role)

    def solve(self) -> Channels:
        """Turn ties into channels."""
        inner = self._components(self._ties)
        channel = self._components(self._ties + self._additions)
        reason: dict[int, str] = {}
        for labels, why in self._fixes:
            for fixed in np.unique(channel[labels]):
                reason.setdefault(int(fixed), why)
        streams = [first[inner[first] != inner[second]] for first, second in self._additions]
        stream, contracted = (
            frozenset(int(c) for labels in several for c in np.unique(channel[labels]))
            for several in (streams, self._contracted)
        )
        return Channels(channel, tuple(self.owners), self.roles, reason, stream, contracted)

    def _components(self, ties: list[tuple[Labels, Labels]]) -> NDArray[np.int32]:
        rows, columns = (
            np.concatenate([np.empty(0, np.int64), *(tie[side] for tie in ties)]) for side in (0, 1)
        )
        links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), (self._count, self._count))
        return connected_components(links, directed=False)[1]


def merge(axes: Axes, parts: Sequence[tuple[Axis, int]], reason: str) -> Axis:
    """The axis of several adjacent dimensions flattened into one.

    Args:
        axes: Where what cannot be widened is noted.
        parts: Axis and size of each dimension, outermost first.
        reason: Why two widenable dimensions cannot be flattened together.
    """
    merged: Axis = None
    total = 1
    for axis, size in parts:
        if merged is not None and axis is not None:
            axes.fix(merged, reason)
            axes.fix(axis, reason)
            merged = None
        elif merged is not None:
            merged = np.repeat(merged, size)
        elif axis is not None:
            merged = np.tile(axis, total)
        total *= size
    return merged


def fold(axes: Axes, axis: Axis, parts: int, reason: str) -> Axis:
    """Tie equal consecutive parts of an axis to one another; the axis of each part."""
    if axis is None:
        return None
    first, *others = np.split(axis, parts)
    for other in others:
        axes.tie(first, other, reason)
    return first


def split(axes: Axes, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
    """The axes of one dimension seen as several; the inverse of `merge` where there is one.

    Only one of them can stay widenable. Where the labels do not say which, it is the last (the width of
    attention heads, the channels of a group), and the entries along the others are tied.

    Args:
        axes: Where ties are noted.
        axis: The axis.
        sizes: Sizes of the dimensions, outermost first.
        reason: Why entries may be fixed by being tied.
    """
    result: list[Axis] = [None] * len(sizes)
    if axis is None:
        return result
    grid = axis.reshape(tuple(sizes))
    wide = [d for d, size in enumerate(sizes) if size > 1] or [len(sizes) - 1]
    for dim in wide:
        along = np.moveaxis(grid, dim, -1).reshape(-1, sizes[dim])
        if (along == along[0]).all():
            result[dim] = along[0]
            return result
    dim = wide[-1]
    flat = np.moveaxis(grid, dim, -1).reshape(-1)
    result[dim] = fold(axes, flat, len(flat) // sizes[dim], reason)
    return result
