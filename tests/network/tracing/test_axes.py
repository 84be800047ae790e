"""Labels: hand-worked ties, merges and splits."""

from __future__ import annotations

import numpy as np

from deepenc.network.sites import Role
from deepenc.network.tracing.axes import Axes, Axis, fold, merge, split


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


def channels_after(axes: Axes, *fixed: Axis) -> tuple[list[int], set[int]]:
    """Channels of the labels of the first owner, and which are fixed, once some axes are."""
    for axis in fixed:
        axes.fix(axis, "fixed")
    channels = axes.solve()
    own = [int(channel) for channel in channels.of(channels.owners[0])]
    return own, set(own) & set(channels.reason)


def test_splitting_ties_all_heads() -> None:
    axes = Axes()
    split(axes, axes.own("a", 0, 6), (2, 3), "")
    (a, b, c, *others), fixed = channels_after(axes)
    assert len({a, b, c}) == 3 and others == [a, b, c] and not fixed


def test_the_part_that_stays_open_carries_the_channels() -> None:
    axes = Axes()
    _, width = split(axes, axes.own("a", 0, 6), (2, 3), "")
    (a, *others), fixed = channels_after(axes, width)
    assert others[:2] == [a, a] and others[2] != a and others[2:] == [others[2]] * 3 and not fixed


def test_where_no_part_stays_open_nothing_does() -> None:
    axes = Axes()
    own, fixed = channels_after(axes, *split(axes, axes.own("a", 0, 6), (2, 3), ""))
    assert fixed == set(own)


def test_what_is_split_and_merged_again_is_as_it_was() -> None:
    axes = Axes()
    heads, width = split(axes, axes.own("a", 0, 6), (2, 3), "")
    axes.tie(axes.own("b", 1, 6), merge(axes, [(heads, 2), (width, 3)], ""), "")
    channels = axes.solve()
    first, second = (list(channels.of(owner)) for owner in channels.owners)
    assert first == second and len(set(first)) == 3


def test_of_two_widenable_dimensions_one_stays_so_when_they_are_flattened() -> None:
    axes = Axes()
    a, b = axes.own("a", 0, 2), axes.own("b", 0, 3)
    axes.tie(axes.own("c", 1, 6), merge(axes, [(a, 2), (b, 3)], "both"), "")
    channels = axes.solve()
    of_a, of_b, of_c = (list(channels.of(owner)) for owner in channels.owners)
    assert of_c == of_b * 2
    assert {channels.reason.get(int(channel)) for channel in of_a} == {"both"}
    assert not set(of_b) & set(channels.reason)


def test_a_parameter_decides_before_what_any_width_fits() -> None:
    axes = Axes()
    merged = merge(axes, [(axes.own("a", 0, 2), 2), (axes.loose(3), 3)], "")
    axes.tie(axes.own("c", 1, 6), merged, "")
    channels = axes.solve()
    (a, b), of_c = (list(channels.of(owner)) for owner in channels.owners)
    assert of_c == [a, a, a, b, b, b] and not {a, b} & set(channels.reason)


def test_equal_entries_follow_what_they_meet_and_pass_on_what_fixes_it() -> None:
    axes = Axes()
    a, zeros = axes.own("a", 0, 3), axes.loose(3)
    axes.tie(zeros, a, "")
    axes.role(zeros, Role.SCALE)
    assert axes.roles == {}
    axes.fix(zeros, "reduced")
    assert set(axes.solve().reason.values()) == {"reduced"}


def test_fold_ties_equal_parts() -> None:
    axes = Axes()
    assert list(fold(axes, axes.own("a", 0, 4), 2, "")) == [0, 1]
    channels = axes.solve().channel
    assert list(channels[:2]) == list(channels[2:])


def test_the_first_word_on_a_role_counts() -> None:
    axes = Axes()
    a = axes.own("a", 1, 2)
    axes.role(a, Role.SCALE)
    axes.role(a, Role.SHIFT)
    channels = axes.solve()
    assert channels.roles == {("a", 1): Role.SCALE} and not channels.reason


def test_what_makes_a_channel_and_reads_it_is_fixed() -> None:
    axes = Axes()
    a = axes.own("a", 1, 4)
    axes.role(a, Role.INCOMING)
    axes.role(a[:2], Role.OUTGOING)
    channels = axes.solve()
    assert channels.roles == {("a", 1): Role.INCOMING}
    assert set(channels.reason) == {int(channels.channel[0]), int(channels.channel[1])}
    assert "a serves as incoming and as outgoing" in next(iter(channels.reason.values()))
