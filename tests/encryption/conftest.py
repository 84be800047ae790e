"""Small networks with sites made by hand, one for each way in which channels can lie in tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepenc.network.sites import Role, Site, Slot

IN, OUT, BIAS = Role.INCOMING, Role.OUTGOING, Role.BIAS
NORM = {"weight": Role.SCALE, "bias": Role.SHIFT, "running_mean": Role.MEAN, "running_var": Role.VARIANCE}


def norm(name: str, start: int = 0) -> tuple[Slot, ...]:
    return tuple(Slot(f"{name}.{part}", 0, role, start) for part, role in NORM.items())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)
        self.norm, self.head = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(torch.cat([x, self.grow(x)], 1))).flatten(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.use = nn.Linear(3, 5), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.use(torch.cat([x, x.relu()], 1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.right.weight = self.left.weight
        self.use = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.left(x).relu() + self.right(-x).relu())


def mlp() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    slots = (Slot("0.weight", 0, IN), Slot("0.bias", 0, BIAS), *norm("1"), Slot("3.weight", 1, OUT))
    return net, torch.randn(5, 3), (Site("0", 6, slots),)


def flat() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(147, 2))
    slots = (Slot("0.weight", 0, IN), Slot("0.bias", 0, BIAS), Slot("3.weight", 1, OUT, block=49))
    return net, torch.randn(4, 1, 8, 8), (Site("0", 3, slots),)


def depthwise() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 2, 1), nn.Flatten()
    )
    slots = (
        *(Slot("0.weight", 0, IN), Slot("0.bias", 0, BIAS), *norm("1")),
        *(Slot("2.weight", 0, IN), Slot("2.bias", 0, BIAS), Slot("3.weight", 1, OUT)),
    )
    return net, torch.randn(3, 2, 4, 4), (Site("0", 6, slots),)


def dense() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    stem = (Slot("stem.weight", 0, IN), Slot("stem.bias", 0, BIAS), Slot("grow.weight", 1, OUT))
    stem += (*norm("norm"), Slot("head.weight", 1, OUT))
    grow = (Slot("grow.weight", 0, IN), Slot("grow.bias", 0, BIAS))
    grow += (*norm("norm", 4), Slot("head.weight", 1, OUT, start=4))
    return Dense(), torch.randn(3, 2, 2, 2), (Site("stem", 4, stem), Site("grow", 3, grow))


def twice() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    slots = (Slot("make.weight", 0, IN), Slot("make.bias", 0, BIAS))
    slots += (Slot("use.weight", 1, OUT), Slot("use.weight", 1, OUT, start=5))
    return Twice(), torch.randn(4, 3), (Site("make", 5, slots),)


def tied() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    slots = (Slot("left.weight", 0, IN), Slot("use.weight", 1, OUT))
    return Tied(), torch.randn(4, 3), (Site("left", 5, slots),)


def chain() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 2), nn.Flatten()
    )
    first = (Slot("0.weight", 0, IN), Slot("0.bias", 0, BIAS), Slot("2.weight", 1, OUT))
    second = (Slot("2.weight", 0, IN), Slot("2.bias", 0, BIAS), Slot("4.weight", 1, OUT))
    return net, torch.randn(3, 1, 6, 6), (Site("0", 4, first), Site("2", 5, second))


NETS = {f.__name__: f for f in (mlp, flat, depthwise, dense, twice, tied, chain)}


def _made(name: str) -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, inputs, sites = NETS[name]()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # unlike its defaults, as if trained
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return net.eval(), inputs, sites


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    """Each of the networks in turn: the network in eval mode, a batch of inputs, and its sites."""
    return _made(request.param)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    """One network with a BatchNorm."""
    return _made("mlp")


@pytest.fixture
def two_sites() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    """One network in which two sites meet in one tensor."""
    return _made("chain")


@pytest.fixture
def tied_net() -> tuple[nn.Module, Tensor, tuple[Site, ...]]:
    """One network with a tied tensor."""
    return _made("tied")
