"""Which dimensions of which tensors carry the same channels.

Every entry of every dimension of a parameter gets a label, a non-negative integer. Operators pass labels
on to their results and tie labels that must be the same channel; what cannot be widened is fixed, with a
reason. An axis is the label array of one dimension, or None where the dimension is fixed for a reason not
worth telling (batch, space, the network's own inputs). Negative labels stand for single fixed entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from deepenc.network.sites import Role

Labels = NDArray[np.int64]
Axis = Labels | None
UNFOLLOWED = "is not followed"


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

    def unfollowed(self) -> dict[str, str]:
        """Tensors that went no further than an operator without a rule, and which that was."""
        known = {tensor for tensor, _ in self.roles}
        reasons: dict[str, str] = {}
        for owner in self.owners:
            for channel in self.of(owner) if owner.tensor not in known else ():
                if UNFOLLOWED in (reason := self.reason.get(int(channel), "")):
                    reasons.setdefault(owner.tensor, reason)
        return reasons


@dataclass(frozen=True, eq=False)
class _Grid:
    """One dimension seen as several; see `Axes.grid`."""

    labels: Labels
    parts: tuple[Axis, ...]
    reason: str

    def members(self) -> Labels:
        """All labels of it and of its parts."""
        every = np.concatenate([self.labels.ravel(), *(part for part in self.parts if part is not None)])
        return every[every >= 0]

    def last(self) -> int:
        """The last part that has labels."""
        return max(dim for dim, part in enumerate(self.parts) if part is not None)

    def open(
        self, channel: NDArray[np.int32], fixed: NDArray[np.bool_], bound: NDArray[np.bool_]
    ) -> list[int]:
        """The parts that may carry the channels, the best last.

        Args:
            channel: Channel of each label.
            fixed: Whether a channel is fixed.
            bound: Whether a channel has others than loose labels.
        """
        found = []
        for dim, part in enumerate(self.parts):
            along = channel[part[part >= 0]] if part is not None else np.empty(0, np.int32)
            if not fixed[along].all():
                found.append((bool(bound[along].any()), dim))
        return [dim for _, dim in sorted(found)]


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
        self._grids: list[_Grid] = []
        self._loose: list[Labels] = []

    def own(self, tensor: str, dim: int, size: int) -> Labels:
        """Labels for a dimension of a parameter."""
        self.owners.append(Owner(tensor, dim, self._count, size))
        return self.fresh(size)

    def loose(self, size: int) -> Labels:
        """Labels of equal entries of no parameter, which follow any width that they meet."""
        labels = self.fresh(size)
        self._loose.append(labels)
        return labels

    def fresh(self, size: int) -> Labels:
        """Labels of no parameter, to be tied to others."""
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
        """Say what a parameter's entries are to their channels; the first word counts.

        What carries a silent channel on is zero. Entries that besides do something else, as those of an
        embedding that is tied to the head, would have to be both, and are fixed.
        """
        if axis is None or not self.owners:
            return
        starts = np.array([owner.first for owner in self.owners])
        places = np.searchsorted(starts, axis, side="right") - 1
        for index in np.unique(places[(axis >= 0) & (places >= 0)]):
            owner = self.owners[int(index)]
            own = axis[(places == index) & (axis < owner.first + owner.size)]  # the others are loose
            if len(own):
                first = self.roles.setdefault((owner.tensor, owner.dim), role)
                if (first is Role.OUTGOING) is not (role is Role.OUTGOING):
                    self.fix(own, f"{owner.tensor} serves as {first} and as {role} weights of it")

    def grid(self, labels: Labels, parts: Sequence[Axis], reason: str) -> None:
        """Say that one dimension is seen as several, of which one carries its channels.

        Which one it is, only later operators tell, by what they fix; `solve` decides.

        Args:
            labels: Labels of the one dimension, in the shape of the several.
            parts: Axes of the several, outermost first; None for those that carry none.
            reason: Why the others cannot be widened.
        """
        self._grids.append(_Grid(labels, tuple(parts), reason))

    def solve(self) -> Channels:
        """Turn ties into channels."""
        self._decide()
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

    def _decide(self) -> None:
        """Choose the part of each grid that carries the channels: the last that is open, loose ones last.

        A choice fixes the other parts, which decides for grids that share them; so those that have one open
        part left go first, and of the others, those that share nothing, together.
        """
        pending = self._grids
        loose = np.zeros(self._count, bool)
        for labels in self._loose:
            loose[labels] = True
        while pending:
            channel = self._components(self._ties + self._additions)
            fixed, bound, touched = (np.zeros(self._count, bool) for _ in range(3))
            bound[channel[~loose]] = True
            for labels, _ in self._fixes:
                fixed[channel[labels]] = True
            later: list[_Grid] = []
            choices = [(grid, grid.open(channel, fixed, bound)) for grid in pending]
            certain = any(len(parts) < 2 for _, parts in choices)
            for grid, parts in choices:
                near = channel[grid.members()]
                if len(parts) > 1 and (certain or touched[near].any()):
                    later.append(grid)
                    continue
                touched[near] = True
                self._choose(grid, parts[-1] if parts else grid.last())
            pending = later
        self._grids = []

    def _choose(self, grid: _Grid, wide: int) -> None:
        for dim, part in enumerate(grid.parts):
            if dim != wide:
                self.fix(part, grid.reason)
        along = np.moveaxis(grid.labels, wide, -1)
        self.tie(along.ravel(), np.broadcast_to(_some(grid.parts[wide]), along.shape).ravel(), grid.reason)

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
        reason: Why of two widenable dimensions only one stays so.
    """
    sizes = [size for _, size in parts]
    wide = [dim for dim, (axis, _) in enumerate(parts) if axis is not None]
    if not wide:
        return None
    if len(wide) == 1:
        shape = [-1 if dim == wide[0] else 1 for dim in range(len(sizes))]
        return np.broadcast_to(_some(parts[wide[0]][0]).reshape(shape), sizes).ravel()
    merged = axes.fresh(math.prod(sizes))
    axes.grid(merged.reshape(sizes), [axis for axis, _ in parts], reason)
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

    Only one of them can stay widenable, and the entries along the others are tied. Where the labels do not
    say which, all are open until `Axes.solve`.

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
    for dim in wide:
        result[dim] = axes.fresh(sizes[dim])
    axes.grid(grid, result, reason)
    return result


def _some(axis: Axis) -> Labels:
    assert axis is not None
    return axis
