"""A copy of a network computes with its own tensors, or the network is refused by the name of the module."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.errors import TraceError
from deepenc.network.find import find_sites
from deepenc.network.structure import named_tensors, replace_tensors
from tests.network.small_networks import ROW, Layers, layers

DEFENSE = Defense.model_validate(
    {"name": "test", "placement": {"name": "proportional", "proportion": 0.3}, "weights": "init"}
)


def plain() -> Any:
    torch.manual_seed(0)
    return Layers().eval()


def patched() -> Any:
    model = plain()
    before = model.second.forward
    model.second.forward = lambda x: before(x) * 1.0
    return model


def patched_with_a_default() -> Any:
    model = plain()
    model.use = lambda m, x, own=model.second: m.last(own(m.first(x).relu()).relu())
    return model


def patched_through_a_list() -> Any:
    model = plain()
    kept = {"layers": [(model.second,)]}
    model.second.forward = lambda x: nn.functional.linear(x, kept["layers"][0][0].weight)
    return model


def hooked_with_a_closure() -> Any:
    model = plain()
    model.second.register_forward_hook(lambda _, __, result: result + model.first.bias.sum())
    return model


def partial_of_a_closure() -> Any:
    model = plain()

    def scaled(factor: float, x: Tensor) -> Tensor:
        return model.second(x) * factor  # type: ignore[no-any-return]

    model.use = lambda m, x: m.last(m.scaled(m.first(x).relu()).relu())
    model.scaled = partial(scaled, 2.0)
    return model


CLOSURES = {
    "patched": patched,
    "default": patched_with_a_default,
    "list": patched_through_a_list,
    "hook": hooked_with_a_closure,
    "partial": partial_of_a_closure,
}


@pytest.mark.parametrize("name", CLOSURES)
def test_functions_that_hold_on_to_the_network_are_refused(name: str) -> None:
    model = CLOSURES[name]()
    with pytest.raises(TraceError, match=r"keeps in '\w+' a function that holds on to"):
        find_sites(model, ROW)
    with pytest.raises(TraceError, match="a function that holds on to"):
        replace_tensors(model, named_tensors(plain()))


def referring_weakly() -> Any:
    model = plain()
    model.own = weakref.ref(model.second)
    model.use = lambda m, x: m.last(m.own()(m.first(x).relu()).relu())
    return model


class Holder:
    """Is not copied."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return self


def held_elsewhere() -> Any:
    model = plain()
    model.holder = Holder(model.second)
    model.use = lambda m, x: m.last(m.holder.held(m.first(x).relu()).relu())
    return model


REGISTRY: dict[str, Any] = {}


def registered_elsewhere() -> Any:
    model = plain()
    REGISTRY["layer"] = model.second
    model.use = lambda m, x: m.last(REGISTRY["layer"](m.first(x).relu()).relu())
    return model


def only_a_view() -> Any:
    model = plain()
    model.holder = Holder(model.second.weight.detach()[:, :])
    model.use = lambda m, x: m.last((m.first(x).relu() @ m.holder.held.t()).relu())
    return model


@pytest.mark.parametrize("build", [referring_weakly, held_elsewhere, registered_elsewhere, only_a_view])
def test_computing_with_the_original_is_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(TraceError, match=r"computes with second\.weight of the network that it is a copy of"):
        find_sites(build(), ROW)


def test_parameters_that_are_not_registered_are_refused() -> None:
    model = plain()
    model.loose = [nn.Linear(6, 5)]
    model.use = lambda m, x: m.last(m.loose[0](m.first(x).relu()).relu())
    with pytest.raises(TraceError, match="the network computes with a parameter that is not registered"):
        find_sites(model, ROW)


def test_views_that_copies_cannot_keep_are_refused() -> None:
    model = plain()
    model.half = model.second.weight.data[:, :3]
    model.use = lambda m, x: m.last((m.first(x)[:, :3] @ m.half.t()).relu() + m.second(m.first(x)))
    with pytest.raises(TraceError, match=r"shares memory with second\.weight but is not registered"):
        find_sites(model, ROW)


def bound_method() -> Any:
    model = plain()
    model.call = model.second.forward
    model.use = lambda m, x: m.last(m.call(m.first(x).relu()).relu())
    return model


def partial_of_a_module() -> Any:
    model = plain()
    model.call = partial(nn.Linear.forward, model.second)
    model.use = lambda m, x: m.last(m.call(m.first(x).relu()).relu())
    return model


def callable_object() -> Any:
    class Timed:
        def __init__(self, call: Any) -> None:
            self.call = call

        def __call__(self, x: Tensor) -> Any:
            return self.call(x)

    model = plain()
    model.second.forward = Timed(model.second.forward)
    return model


@pytest.mark.parametrize("build", [bound_method, partial_of_a_module, callable_object])
def test_what_is_copied_with_the_network_is_followed(build: Callable[[], Any]) -> None:
    model = build()
    expected = model(ROW)
    assert [site.name for site in find_sites(model, ROW)] == ["first", "second"]
    encrypted, key = encrypt(model, ROW, DEFENSE, seed=0)
    with torch.no_grad():
        model.second.weight.add_(1)  # what the owner does afterwards changes no copy
    assert torch.equal(decrypt(encrypted, key)(ROW), expected)


class Forgetful(nn.Sequential):
    """Comes back from a copy in training mode, as networks that torch.fx makes do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Forgetful:
        return Forgetful(*(copy.deepcopy(module, memo) for module in self)).train()


def test_copies_are_in_the_mode_of_the_original() -> None:
    torch.manual_seed(0)
    body = Forgetful(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5), nn.Linear(5, 2))
    body[1].running_mean.normal_()
    model = nn.Sequential(body).eval()
    body[2].train()
    assert [site.name for site in find_sites(model, ROW)] == ["0.0", "0.3"]
    encrypted, key = encrypt(model, ROW, DEFENSE, seed=0)
    for network in (encrypted, decrypt(encrypted, key)):
        assert [m.training for m in network.modules()] == [m.training for m in model.modules()]


class Lossy(nn.Sequential):
    """Its copies have their first factor again, whatever it is now."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.factor = 1.0
        self.more = [{"factor": torch.ones(())}]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.factor * self.more[0]["factor"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Lossy:
        return Lossy(*(copy.deepcopy(module, memo) for module in self))


def test_copies_that_lose_a_number_or_a_hook_are_refused() -> None:
    model = Lossy(nn.Linear(3, 6), nn.Linear(6, 2)).eval()
    assert [site.name for site in find_sites(model, ROW)] == ["0"]
    model.factor = 2.0
    with pytest.raises(TraceError, match=r"\(Lossy\) cannot be copied: its copy has another 'factor'"):
        find_sites(model, ROW)
    model.factor = 1.0
    model.more[0]["factor"] += 1
    with pytest.raises(TraceError, match=r"\(Lossy\) cannot be copied: its copy has another 'more'"):
        find_sites(model, ROW)
    model.more[0]["factor"] -= 1
    model.register_forward_hook(lambda _, __, result: result * 2)
    with pytest.raises(
        TraceError, match=r"\(Lossy\) cannot be copied: its copy has another '_forward_hooks'"
    ):
        find_sites(model, ROW)


def test_a_train_method_that_returns_nothing_will_do() -> None:
    class Frozen(Layers):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)

    torch.manual_seed(0)
    assert [site.name for site in find_sites(Frozen(), ROW)] == ["first", "second"]


def test_a_list_of_registered_modules_is_copied_with_them() -> None:
    model, x = layers(lambda m, x: m.last(m.plain[1](m.plain[0](x).relu()).relu()), plain=[])
    model.plain = [model.first, model.second]
    assert [site.name for site in find_sites(model.eval(), x)] == ["first", "second"]
