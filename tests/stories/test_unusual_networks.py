"""Unusual networks are carried along exactly, and what is not widened is explained."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.network.find import analyse, find_sites
from deepenc.network.tracing.admit import tensors_in
from tests.network.small_networks import IMAGE, ROW, Answer, Case, Layers, convolutional, layers

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.3}, "weights": "init"}
)


def tied() -> Case:
    model, x = layers(lambda m, x: m.last(m.second(m.first(x).relu() + m.other(-x).relu())))
    model.other = nn.Linear(3, 6)
    model.other.weight = model.first.weight
    return model, x


def recurrent() -> Case:
    def use(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for _ in range(3):
            x = m.again(x).tanh()
        return m.last(m.second(x))

    return layers(use, again=nn.Linear(6, 6))


def lstm() -> Case:
    def use(m: Any, x: Tensor) -> Tensor:
        return m.last(m.second(m.first(m.rnn(x[:, None])[0][:, -1]).relu()))

    return layers(use, rnn=nn.LSTM(3, 3, batch_first=True))


def gru() -> Case:
    return layers(lambda m, x: m.last(m.cell(m.first(x).relu())), cell=nn.GRUCell(6, 5))


def complex_numbers() -> Case:
    model, x = layers(lambda m, x: m.last(m.second(m.back(m.first(x.to(m.first.weight))).abs()).relu()))
    model.first, model.back = nn.Linear(3, 6, dtype=torch.cfloat), nn.Linear(6, 6, dtype=torch.cfloat)
    return model, x


def integers() -> Case:
    model, x = layers(lambda m, x: m.last(m.second(F.linear(x, m.packed * m.scale)).relu()))
    del model.first
    model.packed = nn.Parameter(torch.randint(-8, 8, (6, 3), dtype=torch.int8), requires_grad=False)
    model.register_buffer("scale", torch.rand(6, 1))
    return model, x


def eighths() -> Case:
    model, x = layers(lambda m, x: m.last(m.second(F.linear(x, m.small.float())).relu()))
    del model.first
    model.small = nn.Parameter(torch.randn(6, 3).to(torch.float8_e4m3fn), requires_grad=False)
    return model, x


def counting() -> Case:
    def use(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.last(m.second(m.first(x).relu()))

    model, x = layers(use)
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return model, x


def parametrized(norm: Callable[[nn.Module], Any], layer: int) -> Case:
    model = convolutional()
    norm(model[layer])
    return model, IMAGE


def old_spectral_norm() -> Case:
    model = convolutional()
    torch.nn.utils.spectral_norm(model[3])
    return model, IMAGE


def hooked() -> Case:
    model = convolutional()
    model[0].register_forward_hook(lambda _, __, result: result * 2)
    model[3].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    return model, IMAGE


def frozen() -> Case:
    model = convolutional()
    model[0].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    return model, IMAGE


def training() -> Case:
    model = convolutional().train()
    model[1].eval()
    return model, IMAGE


def compiled_in_place() -> Case:
    model = convolutional()
    model.compile(backend="eager")
    return model, IMAGE


def transposed_alias() -> Case:
    model, x = layers(lambda m, x: m.last(m.second(m.back(m.front(x)).relu())), front=nn.Linear(3, 6))
    model.back = nn.Linear(6, 6)
    model.back.weight = nn.Parameter(model.back.weight.data.t())  # not contiguous
    del model.first
    return model, x


class Extra(nn.Linear):
    """Keeps more than tensors in its state dict."""

    def get_extra_state(self) -> Any:
        return {"note": [1, 2]}

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class Copied(nn.Sequential):
    """Copies itself in its own way, and well."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        return Copied(*(copy.deepcopy(module, memo) for module in self)).train(self.training)


class Saved(nn.Sequential):
    """Leaves something out of its state, and well."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}


def saved() -> Case:
    model = Saved(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    model.lock = threading.Lock()
    return model, ROW


def answering() -> Case:
    def use(m: Any, x: Tensor) -> Answer:
        features = m.second(m.first(x).relu())
        return Answer(m.last(features), features)

    return layers(use)


def fixed_view(m: Any, x: Tensor) -> Tensor:
    return m.last(m.second(m.first(x).view(-1, m.width)).relu())


def autoencoder(m: Any, x: Tensor) -> Tensor:
    restored = F.linear(m.first(x).relu(), m.first.weight.t())
    return m.last(m.second(m.middle(restored).relu()).relu())


# What is admitted, with the sites that a reader of the network finds.
SUPPORTED: dict[str, tuple[Callable[[], Case], list[str]]] = {
    "plain": (lambda: (convolutional(), IMAGE), ["0", "3", "6"]),
    "half precision": (lambda: (convolutional().half(), IMAGE.half()), ["0", "3", "6"]),
    "bfloat16": (lambda: (convolutional().bfloat16(), IMAGE.bfloat16()), ["0", "3", "6"]),
    "double precision": (lambda: (convolutional().double(), IMAGE.double()), ["0", "3", "6"]),
    "channels last": (
        lambda: (convolutional().to(memory_format=torch.channels_last), IMAGE),
        ["0", "3", "6"],
    ),
    "hooks": (hooked, ["0", "3", "6"]),
    "frozen parameters": (frozen, ["0", "3", "6"]),
    "training mode": (training, ["0", "3", "6"]),
    "compiled in place": (compiled_in_place, ["0", "3", "6"]),
    "weight norm": (
        lambda: parametrized(
            parametrizations.weight_norm, 0
        ),  # each channel's weights have a norm of their own
        ["0.parametrizations.weight.original1", "3", "6"],
    ),
    "spectral norm": (lambda: parametrized(parametrizations.spectral_norm, 3), ["6"]),
    "orthogonal": (lambda: parametrized(parametrizations.orthogonal, 6), ["0"]),
    "old spectral norm": (old_spectral_norm, ["6"]),
    "LSTM": (lstm, ["first", "second"]),
    "GRU": (gru, ["first"]),
    "one layer thrice": (recurrent, ["first", "second"]),
    "one weight, two layers": (tied, ["first", "second"]),
    "a weight and its transpose": (lambda: layers(autoencoder, middle=nn.Linear(3, 6)), ["middle", "second"]),
    "a strided weight": (transposed_alias, ["front", "back", "second"]),
    "complex weights": (complex_numbers, ["second"]),
    "integer weights": (integers, ["second"]),
    "8-bit floats": (eighths, ["second"]),
    "a buffer that changes": (counting, ["first", "second"]),
    "extra state": (lambda: (nn.Sequential(Extra(3, 6), nn.ReLU(), Extra(6, 2)), ROW), ["0"]),
    "own copy": (lambda: (Copied(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), ROW), ["0"]),
    "own state": (saved, ["0"]),
    "a list of layers": (
        lambda: layers(lambda m, x: m.last(m.plain[1](m.plain[0](x))), plain=[]),
        ["first", "second"],
    ),
    "a tensor kept as an attribute": (
        lambda: layers(lambda m, x: m.last(m.second(m.first(x) * m.factor).relu()), factor=torch.rand(6)),
        ["second"],
    ),
    "a width kept as a number": (lambda: layers(fixed_view, width=6), ["second"]),
    "an output of its own type": (answering, ["first"]),
}


def made(name: str) -> Case:
    torch.manual_seed(0)
    model, x = SUPPORTED[name][0]()
    if isinstance(model, Layers) and hasattr(model, "plain"):
        model.plain = [model.first, model.second]
    return (model if name == "training mode" else model.eval()), x


def run(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    model, x = made(name)
    before = {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, Tensor)}
    expected = run(model, x)
    sites = find_sites(model, x)
    assert [site.name for site in sites] == SUPPORTED[name][1]
    encrypted, key = encrypt(model, x, DEFENSE, sites=sites, seed=0)
    decrypted = decrypt(encrypted, key)
    assert any(not torch.equal(a, b) for a, b in zip(run(encrypted, x), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(decrypted, x), expected, strict=True))
    for network in (model, decrypted):
        state = network.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[n], tensor) for n, tensor in before.items())
        assert all(state[n].dtype == tensor.dtype for n, tensor in before.items())
    for network in (encrypted, decrypted):
        assert [m.training for m in network.modules()] == [m.training for m in model.modules()]
        assert [p.requires_grad for p in network.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]


def test_what_is_left_out_is_explained() -> None:
    for name, layer, reason in [
        ("a tensor kept as an attribute", "first.weight", "fixed width"),
        ("a width kept as a number", "first.weight", "probe"),
        ("spectral norm", "3.parametrizations.weight.original", "not followed"),
        ("a weight and its transpose", "first.weight", ""),
        ("LSTM", "rnn.weight_ih_l0", "rnn"),
        ("an output of its own type", "second.weight", "output of the network"),
    ]:
        model, x = made(name)
        reasons = {left.layer: left.reason for left in analyse(model, x).left_out}
        assert reason in reasons[layer]
