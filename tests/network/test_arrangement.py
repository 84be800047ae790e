from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepenc.errors import SiteError
from deepenc.network.arrangement import Arrangement, proved
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import named_tensors, replace_tensors

SITE = Site("0", 3, (Slot("0.weight", 0, Role.INCOMING), Slot("0.bias", 0, Role.BIAS),
                     Slot("2.weight", 1, Role.OUTGOING, block=2)))  # fmt: skip
TENSORS = {
    "0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
    "0.bias": torch.tensor([0.1, 0.2, 0.3]),
    "2.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]),
    "2.bias": torch.tensor([7.0]),
}


def test_by_hand() -> None:
    arranged = Arrangement({"0": (2, 0, 1)}, {"0": (1, 0, -1)}).apply(TENSORS, [SITE])
    # Channel 0 doubles, channel 2 is halved; then the places hold channels 2, 0, 1.
    assert arranged["0.weight"].tolist() == [[2.5, 3.0], [2.0, 4.0], [3.0, 4.0]]
    assert torch.equal(arranged["0.bias"], torch.tensor([0.15, 0.2, 0.2]))
    assert arranged["2.weight"].tolist() == [[10.0, 12.0, 0.5, 1.0, 3.0, 4.0]]
    assert "2.bias" not in arranged


def test_undo_is_the_inverse() -> None:
    arrangement = Arrangement({"0": (2, 0, 1)}, {"0": (3, -2, 0)})
    back = arrangement.undo(arrangement.apply(TENSORS, [SITE]), [SITE])
    assert all(torch.equal(back[name], TENSORS[name]) for name in ("0.weight", "0.bias", "2.weight"))


def test_a_normalised_channel_grows_behind_its_normalisation() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    _randomise(net)
    site = next(site for site in find_sites(net.eval(), torch.randn(2, 1, 5, 5)) if site.width == 4)
    tensors = named_tensors(net)
    arranged = Arrangement(powers={site.name: (1, 2, 0, -1)}).apply(tensors, [site])
    factors = torch.tensor([2.0, 4.0, 1.0, 0.5])
    assert torch.equal(arranged["1.weight"], tensors["1.weight"] * factors)
    assert torch.equal(arranged["1.bias"], tensors["1.bias"] * factors)
    assert torch.equal(arranged["0.weight"], tensors["0.weight"])
    assert torch.equal(arranged["1.running_mean"], tensors["1.running_mean"])
    assert torch.equal(arranged["3.weight"], tensors["3.weight"] / factors.view(1, 4, 1, 1))


def _randomise(net: nn.Module) -> None:
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.randn(tensor.shape).abs() + 0.1 if "var" in name else torch.randn(tensor.shape)
            )


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)
        self.norm, self.head = nn.BatchNorm2d(7), nn.Linear(7 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(torch.cat([x, self.grow(x)], 1)).relu().flatten(1))


def bent() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3))


def straight() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def drawn(sites: tuple[Site, ...]) -> Arrangement:
    torch.manual_seed(0)
    order = {site.name: tuple(torch.randperm(site.width).tolist()) for site in sites}
    powers = {s.name: (1, *torch.randint(-1, 2, (s.width - 1,)).tolist()) for s in sites}
    return Arrangement(order, powers)


@pytest.mark.parametrize(
    ("net", "example", "scaled"),
    [
        (straight(), torch.randn(4, 5), {"0"}),
        (bent(), torch.randn(4, 5), set()),
        (Concatenated(), torch.randn(2, 2, 3, 3), {"grow"}),  # the stem's channels are used unnormalised, too
    ],
)
def test_only_what_changes_nothing_is_proved(net: nn.Module, example: Tensor, scaled: set[str]) -> None:
    _randomise(net)
    sites = tuple(find_sites(net.eval(), example))
    wanted = drawn(sites)
    found = proved(net, example, sites, wanted)
    assert found.order == wanted.order
    assert found.powers == {name: wanted.powers[name] for name in scaled}
    other = torch.randn_like(example)
    arranged = replace_tensors(net, found.apply(named_tensors(net), sites))
    assert torch.allclose(arranged(other), net(other), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_undone_exactly_is_left() -> None:
    net = straight()
    with torch.no_grad():
        net[0].weight[0, 0] = torch.finfo(torch.float32).max  # doubled, it is infinite
    example = torch.zeros(1, 5)
    sites = tuple(find_sites(net.eval(), example))
    found = proved(net, example, sites, drawn(sites))
    assert found.order
    assert not found.powers


@pytest.mark.parametrize(
    "wrong",
    [
        Arrangement({"1": (0, 1, 2)}),
        Arrangement({"0": (0, 1)}),
        Arrangement({"0": (0, 1, 1)}),
        Arrangement(powers={"0": (0, 1)}),
        Arrangement(powers={"0": (0, 1, 99)}),
    ],
)
def test_wrong_arrangements(wrong: Arrangement) -> None:
    with pytest.raises(SiteError, match="expected"):
        wrong.check([SITE])
