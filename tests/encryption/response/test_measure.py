"""What is read out of networks, against the same layers called one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.response.measure import ResponseReader
from deepenc.encryption.response.objective import response_change
from deepenc.errors import ConfigError
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout
from deepenc.tasks.next_token import NextToken
from deepenc.victims.models import CifarResNet

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]


class Body(nn.Module):
    """A Linear that comes last among the modules, and is called first; another one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.block = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(inplace=True))
        self.first = nn.Linear(3, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.block(self.first(x)) - 1))
        return out


@pytest.fixture
def body() -> tuple[Body, Body, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        one = Body()
        other = copy.deepcopy(one)
        nn.init.normal_(other.first.weight)
        nn.init.normal_(other.head.weight)
        return one, other, torch.randn(7, 3)


def inside(net: Body, x: Tensor) -> dict[str, Tensor]:
    """What is compared, worked out layer by layer."""
    norm = net.block[0]
    with torch.no_grad():
        before = norm(torch.relu(norm(net.first(x))) - 1)
        logits = net.head(torch.relu(before))
        return {
            "features": torch.relu(before),
            "features:block.0": before,  # and not what the ReLU after it made of the same memory
            "features:head": logits,
            "logits": logits,
            "probabilities": torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True),
        }


@pytest.mark.parametrize("batch_size", [3, 256])
@pytest.mark.parametrize(
    "measure", ["features", "features:block.0", "features:head", "logits", "probabilities"]
)
def test_response_by_layers(body: tuple[Body, Body, Tensor], measure: str, batch_size: int) -> None:
    one, other, x = body
    clean, changed = inside(one, x)[measure].double(), inside(other, x)[measure].double()
    squares = (clean - changed).square().sum(1)
    found = response_change(one, other, x, batch_size, measure)
    assert found.l2 == pytest.approx(squares.sqrt().mean().item(), rel=1e-5)
    assert found.squared == pytest.approx(squares.mean().item(), rel=1e-5)
    assert found.relative == pytest.approx(squares.sum().item() / clean.square().sum().item(), rel=1e-5)


def test_probabilities_are_those_of_each_place() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    reader = ResponseReader(nn.Identity().eval(), "probabilities", logits, NextToken())
    wanted = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    assert torch.allclose(reader(nn.Identity().eval(), logits), wanted.flatten(1))


def test_features_of_a_head_do_not_depend_on_it(body: tuple[Body, Body, Tensor]) -> None:
    one, _, x = body
    other = copy.deepcopy(one)
    nn.init.normal_(other.head.weight)
    assert response_change(one, other, x).l2 > 0
    assert response_change(one, other, x, measure="features").l2 == 0


def test_networks_stay_as_they_are(body: tuple[Body, Body, Tensor]) -> None:
    one, other, x = body
    response_change(one, other, x, measure="features")
    response_change(one, other, x, measure="features:block")
    for module in (*one.modules(), *other.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks

    def broken(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise ArithmeticError

    hook = other.head.register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError):
        response_change(one, other, x, measure="features:block")
    hook.remove()
    assert not other.block._forward_hooks


def test_features_in_which_confusion_channels_lie(net: Net) -> None:
    """The inputs of the last Linear are the site's own channels in most of these networks."""
    model, inputs, sites = net
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    if not last:
        with pytest.raises(ConfigError, match=r"calls none; name a layer.*features:layer3"):
            response_change(model, model, inputs, measure="features")
        return
    defense = {"base": "paper-init", "name": "t", "placement": "absolute:count=2"}
    encrypted, key = encrypt(model, inputs, defense, seed=0, sites=sites)
    layout = key.layout()
    with pytest.raises(ConfigError, match=r"confusion channels are among them; give key.layout"):
        response_change(model, encrypted, inputs, measure="features")
    # One site: its real channels are what they were, wherever the confusion channels stand.
    assert response_change(model, encrypted, inputs, measure="features", layout=layout).l2 == 0
    wrong = Layout(sites, {name: tuple(range(len(held))) for name, held in key.positions.items()})
    assert key.positions != wrong.positions
    assert response_change(model, encrypted, inputs, measure="features", layout=wrong).l2 > 0
    assert response_change(model, encrypted, inputs, layout=layout).l2 > 0


def test_features_of_a_residual_network() -> None:
    """Nothing is inserted into the stream, of which the last Linear sees the mean."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = CifarResNet(8, channels=1).eval(), torch.randn(5, 1, 8, 8)
    encrypted, _ = encrypt(model, inputs, "paper-init", seed=0)
    with torch.no_grad():
        streams = [net.get_submodule("layer3")(net.layer2(net.layer1(stem(net, inputs)))) for net in
                   (model, encrypted)]  # type: ignore[operator]  # fmt: skip
    distance = (streams[0] - streams[1]).flatten(1).norm(dim=1).mean().item()
    assert response_change(model, encrypted, inputs, measure="features:layer3").l2 == pytest.approx(
        distance, rel=1e-5
    )
    pooled = (streams[0] - streams[1]).mean((2, 3)).norm(dim=1).mean().item()
    assert response_change(model, encrypted, inputs, measure="features").l2 == pytest.approx(pooled, rel=1e-4)
    with pytest.raises(ConfigError, match=r"layer 'layer1.0.conv1'.*name a layer behind the site"):
        response_change(model, encrypted, inputs, measure="features:layer1.0.conv1")


def stem(net: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(net.bn1(net.conv1(x)))  # type: ignore[operator]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two, self.head, self.idle = nn.Identity(), nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = self.two((x, x))
        return {"logits": self.head(both[0] * 2)}


def test_features_of_networks_whose_outputs_are_no_tensor() -> None:
    one, other, x = Pair().eval(), Pair().eval(), torch.ones(2, 3)
    assert response_change(one, other, x, measure="features").l2 == 0
    assert response_change(one, other, x).l2 > 0, "numbers in a dict can be compared"
    with pytest.raises(ConfigError, match=r"layer 'two' that maps 2 examples.*tuple; name another layer"):
        response_change(one, other, x, measure="features:two")
    with pytest.raises(ConfigError, match="does not call the layer 'idle'"):
        response_change(one, other, x, measure="features:idle")
    with pytest.raises(ConfigError, match=r"no layer 'haed': did you mean 'head'"):
        response_change(one, other, x, measure="features:haed")
    with pytest.raises(ConfigError, match="eval"):
        response_change(one.train(), other, x, measure="features")


@pytest.mark.parametrize("text", ["", "l3", "features:", "logits:head", ":head", "Features"])
def test_measures_that_there_are_not(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 'logits', .*'features:NAME'.*got"):
        ResponseReader(nn.Linear(1, 1).eval(), text, torch.ones(1, 1))
