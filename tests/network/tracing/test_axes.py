"""Labels: hand-worked ties, merges and splits."""

from __future__ import annotations

import numpy as np

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axes, fold, merge, split


def test_tied_labels_are_one_channel() -> None:
    axes = Axes()
    a, b, c = axes.own("a", 0, 2), axes.own("b", 0, 2), axes.own("c", 0, 2)
    axes.tie(a, b, "")
    channels = axes.solve()
    assert list(channels.of(channels.owners[0])) == list(channels.of(channels.owners[1]))
    assert set(channels.of(channels.owners[2])).isdisjoint(channels.of(channels.owners[0]))
    assert list(c) == [4, 5]


def test_a_fixed_axis_fixes_what_is_tied_to_it() -> None:
    axes = Axes()
    a, b = axes.own("a", 0, 2), axes.own("b", 0, 2)
    axes.tie(a, b, "")
    assert axes.tie(b, None, "because") is None
    channels = axes.solve()
    assert {channels.reason[int(c)] for c in channels.of(channels.owners[0])} == {"because"}


def test_single_entries_can_be_fixed() -> None:
    axes = Axes()
    a = axes.own("a", 0, 3)
    padded = np.concatenate([axes.rigid(1, "pad"), a[:2]])
    axes.tie(a, padded, "meets")
    channels = axes.solve()
    # Entry 0 meets the padding; entries 1 and 2 meet 0 and 1, and so are the same channel.
    assert len(set(channels.of(channels.owners[0]))) == 1
    assert channels.reason


def test_merge_and_split_are_inverse() -> None:
    axes = Axes()
    a = axes.own("a", 0, 3)
    flat = merge(axes, [(a, 3), (None, 4)], "")
    assert list(flat) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    back = split(axes, flat, (3, 2, 2), "")
    assert list(back[0]) == [0, 1, 2] and back[1] is None and back[2] is None
    assert list(merge(axes, [(None, 2), (a, 3)], "")) == [0, 1, 2, 0, 1, 2]


def test_splitting_ties_all_heads() -> None:
    axes = Axes()
    a = axes.own("a", 0, 6)
    heads, width = split(axes, a, (2, 3), "")
    assert heads is None and list(width) == [0, 1, 2]
    channels = axes.solve().channel
    assert list(channels[:3]) == list(channels[3:])


def test_two_widenable_dimensions_cannot_be_flattened() -> None:
    axes = Axes()
    assert merge(axes, [(axes.own("a", 0, 2), 2), (axes.own("b", 0, 3), 3)], "both") is None
    assert set(axes.solve().reason.values()) == {"both"}


def test_fold_ties_equal_parts() -> None:
    axes = Axes()
    assert list(fold(axes, axes.own("a", 0, 4), 2, "")) == [0, 1]
    channels = axes.solve().channel
    assert list(channels[:2]) == list(channels[2:])


def test_the_first_word_on_a_role_counts() -> None:
    axes = Axes()
    a = axes.own("a", 1, 2)
    axes.role(a, Role.OUTGOING)
    axes.role(a, Role.SCALE)
    assert axes.solve().roles == {("a", 1): Role.OUTGOING}
