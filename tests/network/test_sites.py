"""One row a channel, wherever the channels lie."""

from __future__ import annotations

import pytest
import torch

from deepenc.errors import SiteError
from deepenc.network.sites import Role, Site, Slot


def test_rows_by_hand():
    # Two channels: rows 1 and 2 of "a"; columns 2-3 and 4-5 of "b", blocks of two.
    state = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(100.0, 114.0).view(2, 7)}
    incoming = Slot("a", 0, Role.INCOMING, start=1)
    outgoing = Slot("b", 1, Role.OUTGOING, start=2, block=2)
    site = Site("s", 2, (incoming, outgoing))
    ((slot, rows),) = site.rows(state, Role.INCOMING)
    assert slot == incoming
    assert rows.tolist() == [[3, 4, 5], [6, 7, 8]]
    # The features of a channel come in any order.
    ((slot, rows),) = site.rows(state, Role.OUTGOING)
    assert slot == outgoing
    assert rows.sort(dim=1).values.tolist() == [[102, 103, 109, 110], [104, 105, 111, 112]]
    assert not list(site.rows(state, Role.BIAS))


def test_slots_of_a_role_come_in_the_sites_order():
    state = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0], [4.0]])}
    site = Site("s", 2, (Slot("b", 0, Role.INCOMING), Slot("a", 0, Role.INCOMING)))
    assert [rows.tolist() for _, rows in site.rows(state, Role.INCOMING)] == [[[3], [4]], [[1], [2]]]


@pytest.mark.parametrize(("dim", "start"), [(0, 3), (2, 0)])
def test_a_slot_outside_its_tensor_is_a_clear_error(dim, start):
    with pytest.raises(SiteError, match="another network"):
        Slot("a", dim, Role.INCOMING, start=start).rows(torch.zeros(4, 3), 2)


def test_entries_and_what_is_laid_along_them_by_hand():
    slot = Slot("layer.weight", 1, Role.OUTGOING, start=1, block=2)
    assert slot.module == "layer"
    assert slot.span(3) == slice(1, 7)
    assert slot.entries([2, 0]).tolist() == [5, 6, 1, 2]
    assert slot.entries(torch.tensor([1])).tolist() == [3, 4]
    values, tensor = torch.tensor([5.0, 7.0]), torch.zeros(3, 6)
    assert slot.along(values, 2).tolist() == [[5, 5, 7, 7]]
    assert slot.over(values, tensor, 1.0).tolist() == [[1, 5, 5, 7, 7, 1]]
    slot.part(tensor, 2).fill_(1)
    assert tensor.tolist() == [[0, 1, 1, 1, 1, 0]] * 3
