"""Looking at a network changes nothing: neither the network nor what its code keeps elsewhere."""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepenc.errors import TraceError
from deepenc.network.find import find_sites
from tests.network.small_networks import ROW, Layers, layers

TABLES: dict[int, Tensor] = {}
COUNTED: list[Tensor] = []


@functools.lru_cache
def remembered(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size)


def with_attribute(x: Tensor) -> Tensor:
    if not hasattr(with_attribute, "table"):
        with_attribute.table = torch.linspace(0.5, 1.5, x.shape[-1])  # type: ignore[attr-defined]
    return x * with_attribute.table  # type: ignore[attr-defined]


def with_default(x: Tensor, tables: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return x * tables.setdefault(x.shape[-1], torch.linspace(0.5, 1.5, x.shape[-1], device=x.device))


def closure() -> Callable[[Tensor], Tensor]:
    table = None

    def scaled(x: Tensor) -> Tensor:
        nonlocal table
        table = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device) if table is None else table
        return x * table

    return scaled


class OfClass(Layers):
    tables: ClassVar[dict[int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[-1] not in self.tables:
            self.tables[x.shape[-1]] = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device)
        return self.last(self.second(x * self.tables[x.shape[-1]]).relu())


def of_module(x: Tensor) -> Tensor:
    if x.shape[-1] not in TABLES:
        TABLES[x.shape[-1]] = torch.linspace(0.5, 1.5, x.shape[-1], device=x.device)
    return x * TABLES[x.shape[-1]]


def scaling(how: Callable[[Tensor], Tensor]) -> nn.Module:
    return layers(lambda m, x: m.last(m.second(how(m.first(x))).relu()))[0]


CACHES: dict[str, Callable[[], nn.Module]] = {
    "class": OfClass,
    "module": lambda: scaling(of_module),
    "lru_cache": lambda: scaling(lambda x: x * remembered(x.shape[-1])),
    "function": lambda: scaling(with_attribute),
    "default": lambda: scaling(with_default),
    "closure": lambda: scaling(closure()),
}


@pytest.mark.parametrize("name", CACHES)
def test_tables_outside_the_network_are_as_before(name: str) -> None:
    """The network itself must compute as if nobody had looked, whichever of the two runs first."""
    torch.manual_seed(0)
    model = CACHES[name]().eval()
    assert [site.name for site in find_sites(model, ROW)] == ["second"]
    assert not OfClass.tables and not TABLES and not hasattr(with_attribute, "table")
    assert not with_default.__defaults__[0]  # type: ignore[index]
    after = model(ROW)
    factors = torch.linspace(0.5, 1.5, 6)
    with torch.no_grad():
        expected = model.last(model.second(model.first(ROW) * factors).relu())  # type: ignore[operator]
    assert torch.equal(after, expected)
    assert [site.name for site in find_sites(model, ROW)] == ["second"]
    assert torch.equal(model(ROW), expected)
    OfClass.tables.clear(), TABLES.clear(), remembered.cache_clear(), with_attribute.__dict__.clear()
    with_default.__defaults__[0].clear()  # type: ignore[index]


class Steps(Layers):
    """Counts its calls in its class and keeps what it last computed."""

    calls = 0
    last_seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        type(self).last_seen = x.clone()
        COUNTED.append(self.first(x))
        return self.last(self.second(self.first(x).relu()).relu())


def test_attributes_of_classes_and_lists_are_put_back() -> None:
    find_sites(Steps().eval(), ROW)
    assert (Steps.calls, Steps.last_seen, COUNTED) == (0, None, [])


def test_what_copies_would_share_is_refused() -> None:
    """Weights computed once for all copies are another network's in each but the first."""

    class Fused(Layers):
        fused: ClassVar[dict[str, Tensor]] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "w" not in self.fused:
                self.fused["w"] = self.second.weight @ self.first.weight
            return self.last(F.linear(x, self.fused["w"]).relu())

    with pytest.raises(TraceError, match="keeps what it computes outside of the network"):
        find_sites(Fused().eval(), ROW)
    assert not Fused.fused


def norm_in_place(m: Any, x: Tensor) -> Tensor:
    m.second.weight.data.clamp_(-0.1, 0.1)
    return m.last(m.second(m.first(x).relu()).relu())


def part_in_place(m: Any, x: Tensor) -> Tensor:
    m.second.weight[0].detach().copy_(torch.ones(6))
    return m.last(m.second(m.first(x).relu()).relu())


def power_iteration(m: Any, x: Tensor) -> Tensor:
    m.second.weight.div_(torch.linalg.matrix_norm(m.second.weight, 2))
    return m.last(m.second(m.first(x).relu()).relu())


def caught(m: Any, x: Tensor) -> Tensor:
    try:
        m.second.weight.mul_(0.5)
    except Exception:
        x = x * 1
    return m.last(m.second(m.first(x).relu()).relu())


def whole_list(m: Any, x: Tensor) -> Tensor:
    torch._foreach_mul_([m.first.weight, m.second.weight], 0.5)
    return m.last(m.second(m.first(x).relu()).relu())


def out_argument(m: Any, x: Tensor) -> Tensor:
    torch.mul(m.second.weight, 0.5, out=m.second.weight.data)
    return m.last(m.second(m.first(x).relu()).relu())


def through_numpy(m: Any, x: Tensor) -> Tensor:
    m.second.weight.detach().numpy()[0] *= 0.5
    return m.last(m.second(m.first(x).relu()).relu())


@pytest.mark.parametrize(
    "use", [through_numpy, norm_in_place, part_in_place, power_iteration, caught, whole_list, out_argument]
)
def test_writing_to_weights_is_refused_before_it_happens(use: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = layers(use)[0].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=r"changes its parameter .*weight while it runs"):
        find_sites(model, ROW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def other_parameter(m: Any, x: Tensor) -> Tensor:
    m.second.weight = nn.Parameter(m.second.weight * 0.9)
    return m.last(m.second(m.first(x).relu()).relu())


def other_data(m: Any, x: Tensor) -> Tensor:
    m.second.weight.data = m.second.weight.data * 0.9
    return m.last(m.second(m.first(x).relu()).relu())


@pytest.mark.parametrize("use", [other_parameter, other_data])
def test_putting_other_weights_in_place_is_refused(use: Callable[..., Tensor]) -> None:
    model = layers(use)[0].eval()
    before = model.second.weight, model.second.weight.detach().clone()
    with pytest.raises(TraceError, match=r"another tensor in the place of its parameter second\.weight"):
        find_sites(model, ROW)
    assert model.second.weight is before[0] and torch.equal(before[0], before[1])


COUNTS = {"calls": 0}
NOISE = torch.Generator().manual_seed(5)


def counting(m: Any, x: Tensor) -> Tensor:
    COUNTS["calls"] += 1
    return m.last(m.second(m.first(x).relu()).relu()) * COUNTS["calls"]  # type: ignore[no-any-return]


def noisy(m: Any, x: Tensor) -> Tensor:
    return m.last(m.second(m.first(x).relu()).relu()) + torch.rand(1, generator=NOISE)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use", [counting, noisy])
def test_state_of_the_process_is_as_before(use: Callable[..., Tensor]) -> None:
    state = NOISE.get_state()
    with pytest.raises(TraceError, match="other outputs each time"):
        find_sites(layers(use)[0].eval(), ROW)
    assert COUNTS == {"calls": 0} and torch.equal(NOISE.get_state(), state)


def test_what_other_threads_keep_is_theirs() -> None:
    """A list that the network's code does not name is not put back, whatever is added to it meanwhile."""
    results: list[Any] = []

    def use(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append((1, torch.ones(2))))
        thread.start(), thread.join()
        return m.last(m.second(m.first(x).relu()).relu())  # type: ignore[no-any-return]

    find_sites(layers(use)[0].eval(), ROW)
    assert len(results) >= 4


def test_embeddings_renormalised_as_they_are_read_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 12, max_norm=1.0), nn.Linear(12, 6), nn.Linear(6, 2)).eval()
    before = model[0].weight.detach().clone()
    with pytest.raises(TraceError, match=r"^0 changes its parameter 0\.weight"):
        find_sites(model, torch.arange(9))
    assert torch.equal(model[0].weight, before)


def test_the_example_and_the_random_generators_are_as_before() -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        x.mul_(0.5)
        x = x + torch.rand(3) + random.random() + float(np.random.rand())  # noqa: NPY002
        return m.last(m.second(m.first(x).relu()).relu())

    model, example = layers(use)[0].eval(), ROW.clone()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
    # The same noise each time proves as much as none.
    assert [site.name for site in find_sites(model, example)] == ["first", "second"]
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert torch.equal(example, ROW)


def test_whatever_a_network_raises_is_an_error_of_ours() -> None:
    class Own(Exception):
        pass

    def raising(when: Callable[[Any], bool]) -> nn.Module:
        def use(m: Any, x: Tensor) -> Tensor:
            if when(m):
                raise Own("no\nsecond line")
            return m.last(m.second(m.first(x).relu()).relu())

        return layers(use)[0].eval()

    with pytest.raises(TraceError, match=r"the network \(Layers\) raised Own: no; "):
        find_sites(raising(lambda m: True), ROW)
    with pytest.raises(TraceError, match="raised SystemExit: 3"):
        find_sites(layers(lambda m, x: sys.exit(3))[0], ROW)
    model = raising(lambda m: False)
    assert [site.name for site in find_sites(model, ROW)] == ["first", "second"]
    third = model.second.bias.detach().clone()  # not so once the weights are others
    model.use = lambda m, x: (  # type: ignore[assignment]
        m.last(m.second(m.first(x).relu()).relu()) if torch.equal(m.second.bias, third) else 1 / 0
    )
    with pytest.raises(TraceError, match="with other weights: ZeroDivisionError"):
        find_sites(model, ROW)
