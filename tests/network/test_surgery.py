from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepenc.errors import SiteError
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import replace_tensors
from deepenc.network.surgery import Layout, insert, narrow, narrow_sites, remove, widen

IN, OUT = Role.INCOMING, Role.OUTGOING


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, dict[str, Tensor]]:
    """Sites that meet in two tensors, in any order, with gaps between them, and those tensors."""
    sites, sizes = [], {("t", 0): 0, ("t", 1): 0, ("u", 0): 0}
    positions = {}
    for number in range(draw(st.integers(1, 4))):
        width, slots = draw(st.integers(1, 4)), []
        for _ in range(draw(st.integers(1, 3))):
            tensor, dim = draw(st.sampled_from(sorted(sizes)))
            start = sizes[tensor, dim] + draw(st.integers(0, 2))
            block = draw(st.integers(1, 3))
            slots.append(Slot(tensor, dim, IN, start, block))
            sizes[tensor, dim] = start + block * width
        sites.append(Site(f"s{number}", width, tuple(slots)))
        count = draw(st.integers(0, 3))
        chosen = draw(st.sets(st.integers(0, width + count - 1), min_size=count, max_size=count))
        positions[f"s{number}"] = tuple(sorted(chosen))
    rest = [draw(st.integers(0, 2)) for _ in range(3)]
    t = torch.arange(float((sizes["t", 0] + rest[0]) * (sizes["t", 1] + rest[1]) * 2)) + 1
    tensors = {
        "t": t.reshape(sizes["t", 0] + rest[0], sizes["t", 1] + rest[1], 2),
        "u": torch.arange(sizes["u", 0] + rest[2]) + 1,
    }
    return Layout(draw(st.permutations(sites)), positions), tensors


def slowly_widened(layout: Layout, name: str, tensor: Tensor) -> Tensor:
    """Widen by inserting one channel after the other, site by site, slot by slot, in plain Python."""
    result = tensor.numpy()
    for dim in range(result.ndim):
        slots = [
            (slot, s) for s in layout.sites for slot in s.slots if (slot.tensor, slot.dim) == (name, dim)
        ]
        # From the last slot on, so that the starts of those before stay what they were.
        for slot, site in sorted(slots, key=lambda entry: -entry[0].start):
            for position in layout.positions[site.name]:
                where = slot.start + position * slot.block
                result = np.insert(result, [where] * slot.block, 0, axis=dim)
    return torch.from_numpy(result)


@given(layouts())
def test_widen_agrees_with_inserting_one_by_one_and_narrow_undoes_it(
    case: tuple[Layout, dict[str, Tensor]],
) -> None:
    layout, tensors = case
    changed = set(layout.changed())
    for name, tensor in tensors.items():
        shape = layout.widened_shape(name, tensor.shape)
        kept = layout.kept(name, tensor.shape)
        expected = slowly_widened(layout, name, tensor)
        assert shape == expected.shape
        assert (name in changed) == (shape != tensor.shape)
        wide = widen(tensor, kept, shape)
        assert torch.equal(wide, expected) and wide.dtype == tensor.dtype
        assert layout.narrowed_shape(name, shape) == tensor.shape
        assert torch.equal(narrow(wide, kept), tensor)


@given(layouts())
def test_forged_entries_are_the_ones_that_widen_leaves_empty(case: tuple[Layout, dict[str, Tensor]]) -> None:
    layout, tensors = case
    for name, tensor in tensors.items():
        wide = widen(tensor, layout.kept(name, tensor.shape), layout.widened_shape(name, tensor.shape))
        expected = wide != 0
        filled = torch.ones_like(expected)
        for site in layout.sites:
            for slot in site.slots:
                if slot.tensor == name:
                    filled.index_fill_(slot.dim, layout.confusion_entries(site, slot), False)
        assert torch.equal(filled, expected)


@given(layouts())
def test_narrowing_sites_undoes_widening_them(case: tuple[Layout, dict[str, Tensor]]) -> None:
    layout, _ = case
    wide = layout.widened_sites()
    assert [s.width for s in wide] == [s.width + len(layout.positions[s.name]) for s in layout.sites]
    assert narrow_sites(wide, layout.positions) == layout.sites
    assert narrow_sites(layout.sites, {}) == layout.sites


def test_blocks_and_starts_by_hand() -> None:
    # Entries: one foreign, channels a, b of two entries each, one foreign; a confusion channel between a
    # and b, and one after them.
    slot = Slot("t", 0, IN, start=1, block=2)
    layout = Layout((Site("s", 2, (slot,)),), {"s": (1, 3)})
    kept = layout.kept("t", (6,))
    assert kept[0].tolist() == [0, 1, 2, 5, 6, 9]
    wide = widen(torch.tensor([9, 1, 1, 2, 2, 9]), kept, layout.widened_shape("t", (6,)))
    assert wide.tolist() == [9, 1, 1, 0, 0, 2, 2, 0, 0, 9]
    assert layout.confusion_entries(layout.sites[0], slot).tolist() == [3, 4, 7, 8]


@pytest.mark.parametrize("positions", [(2, 1), (1, 1), (-1, 0), (3, 4), (5,)])
def test_positions_that_do_not_fit(positions: tuple[int, ...]) -> None:
    with pytest.raises(SiteError, match="expected ascending"):
        Layout((Site("s", 2, (Slot("t", 0, IN),)),), {"s": positions})


def test_layouts_that_do_not_fit() -> None:
    site = Site("s", 3, (Slot("t", 0, IN), Slot("t", 0, OUT, start=2)))
    with pytest.raises(SiteError, match="overlaps"):
        Layout((site,), {"s": (0,)})
    with pytest.raises(SiteError, match="does not have"):
        Layout((site,), {"x": (0,)})
    layout = Layout((Site("s", 3, (Slot("t", 1, IN),)),), {"s": (0,)})
    for shape in ((4, 2), (4,)):
        with pytest.raises(SiteError, match="another network"):
            layout.kept("t", shape)


def test_removing_what_is_not_there() -> None:
    sites = (Site("s", 2, (Slot("0.weight", 0, IN), Slot("1.weight", 1, OUT))),)
    for gone in ({"s": (0, 1)}, {"x": (0,)}):
        with pytest.raises(SiteError, match="cannot remove"):
            narrow_sites(sites, gone)
    with pytest.raises(SiteError, match="no tensor"):
        remove(nn.Linear(2, 2), Layout(sites, {"s": (0,)}))
    small = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    with pytest.raises(SiteError, match="another network"):
        remove(small, Layout(sites, {"s": (0,)}))


def mlp() -> tuple[nn.Sequential, tuple[Site, ...]]:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    norm = tuple(Slot(f"1.{part}", 0, IN) for part in ("weight", "bias", "running_mean", "running_var"))
    slots = (Slot("0.weight", 0, IN), Slot("0.bias", 0, IN), *norm, Slot("2.weight", 1, OUT))
    return net, (Site("s", 4, slots),)


@settings(max_examples=20)
@given(st.sets(st.integers(0, 6), min_size=3, max_size=3))
def test_insert_and_remove_on_a_module(chosen: set[int]) -> None:
    net, sites = mlp()
    layout = Layout(sites, {"s": tuple(sorted(chosen))})
    before = copy.deepcopy(net.state_dict())
    wide = insert(net, layout)
    x = torch.randn(5, 3)
    assert torch.allclose(wide(x), net(x), atol=1e-6)
    assert (wide[0].out_features, wide[1].num_features, wide[2].in_features) == (7, 7, 7)
    back = remove(wide, layout)
    assert torch.equal(back(x), net(x))
    assert (back[0].out_features, back[1].num_features, back[2].in_features) == (4, 4, 4)
    for state in (net.state_dict(), back.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.alias = self.a
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_parameter("none", None)


def test_replacing_keeps_ties_flags_and_modes_and_copies_the_rest() -> None:
    net = Mixed()
    net.a.bias.requires_grad_(False)
    weight = torch.randn(3, 2)
    result = replace_tensors(net, {"a.weight": weight, "a.bias": torch.zeros(3), "scale": torch.zeros(3)})
    assert result.a.weight is result.b.weight and result.alias is result.a
    assert result.a.weight.data_ptr() == weight.data_ptr()  # taken as it is
    assert result.a.weight.requires_grad and not result.a.bias.requires_grad
    assert isinstance(result.a.bias, nn.Parameter) and not isinstance(result.scale, nn.Parameter)
    assert result.a.out_features == 3 and net.a.out_features == 2
    assert result.b.bias.data_ptr() != net.b.bias.data_ptr()
    assert result.hidden.data_ptr() != net.hidden.data_ptr()
    assert list(result.state_dict()) == list(net.state_dict())
    with pytest.raises(SiteError, match="no place"):
        replace_tensors(net, {"c.weight": weight})


def channels(into: int, out: int, groups: int = 1) -> dict[str, int]:
    return {"in_channels": into, "out_channels": out, "groups": groups}


@pytest.mark.parametrize(
    ("module", "tensors", "expected"),
    [
        (nn.Conv2d(4, 6, 3), {"weight": (7, 5, 3, 3)}, channels(5, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": (8, 3, 3, 3)}, channels(6, 8, 2)),
        (nn.Conv2d(4, 4, 3, groups=4), {"weight": (6, 1, 3, 3)}, channels(6, 6, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), {"weight": (12, 1, 3, 3)}, channels(6, 12, 6)),
        (nn.ConvTranspose2d(4, 6, 2), {"weight": (5, 7, 2, 2)}, channels(5, 7)),
        (nn.ConvTranspose1d(4, 4, 2, groups=4), {"weight": (5, 1, 2)}, channels(5, 5, 5)),
        (
            nn.BatchNorm2d(4, affine=False),
            dict.fromkeys(("running_mean", "running_var"), (5,)),
            {"num_features": 5},
        ),
        (nn.BatchNorm2d(4, track_running_stats=False), {"weight": (5,), "bias": (5,)}, {"num_features": 5}),
        (nn.LayerNorm(4), {"weight": (5,), "bias": (5,)}, {"normalized_shape": (5,)}),
        (nn.Embedding(4, 3), {"weight": (4, 5)}, {"num_embeddings": 4, "embedding_dim": 5}),
    ],
)
def test_layers_say_the_sizes_they_have(module: nn.Module, tensors: Any, expected: dict[str, Any]) -> None:
    if "out_channels" in expected:
        tensors = {**tensors, "bias": (expected["out_channels"],)}
    result = replace_tensors(module, {name: torch.randn(shape) for name, shape in tensors.items()})
    assert {name: getattr(result, name) for name in expected} == expected
    if isinstance(result, nn.modules.conv._ConvNd):  # and the layer runs
        x = torch.randn(2, expected["in_channels"], *(5,) * len(result.kernel_size))
        assert result(x).shape[1] == expected["out_channels"]
