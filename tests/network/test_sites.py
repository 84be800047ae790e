"""One row a channel, wherever the channels lie."""

from __future__ import annotations

import pytest
import torch

from deepenc.errors import SiteError
from deepenc.network.sites import Role, Site, Slot, role_rows, slot_rows


def test_rows_by_hand():
    # Two channels: rows 1 and 2 of "a"; columns 2-3 and 4-5 of "b", blocks of two.
    state = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(100.0, 114.0).view(2, 7)}
    incoming = Slot("a", 0, Role.INCOMING, start=1)
    outgoing = Slot("b", 1, Role.OUTGOING, start=2, block=2)
    site = Site("s", 2, (incoming, outgoing))
    ((slot, rows),) = role_rows(state, site, Role.INCOMING)
    assert slot == incoming
    assert rows.tolist() == [[3, 4, 5], [6, 7, 8]]
    # The features of a channel come in any order.
    ((slot, rows),) = role_rows(state, site, Role.OUTGOING)
    assert slot == outgoing
    assert rows.sort(dim=1).values.tolist() == [[102, 103, 109, 110], [104, 105, 111, 112]]
    assert not list(role_rows(state, site, Role.BIAS))


def test_slots_of_a_role_come_in_the_sites_order():
    state = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0], [4.0]])}
    site = Site("s", 2, (Slot("b", 0, Role.INCOMING), Slot("a", 0, Role.INCOMING)))
    assert [rows.tolist() for _, rows in role_rows(state, site, Role.INCOMING)] == [[[3], [4]], [[1], [2]]]


@pytest.mark.parametrize(("dim", "start"), [(0, 3), (2, 0)])
def test_a_slot_outside_its_tensor_is_a_clear_error(dim, start):
    with pytest.raises(SiteError, match="another network"):
        slot_rows(torch.zeros(4, 3), Slot("a", dim, Role.INCOMING, start=start), 2)
