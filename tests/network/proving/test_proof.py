"""What is proved is neutral wherever channels are put, however little of it shows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepenc.errors import TraceError
from deepenc.network.find import analyse, find_sites
from deepenc.network.proving.proof import prove
from deepenc.network.sites import Role, Site, Slot
from tests.network.small_networks import ROW, Layers, layers


def tripled(x: Tensor) -> Tensor:
    """Triples three of six channels, by a number that is written down."""
    x = x.clone()
    x[:, :3] = x[:, :3] * 3
    return x


def wrong(use: Callable[[Any, Tensor], Any], **attributes: Any) -> list[str]:
    """Sites of layers `first`, whose channels are tripled in part, and `second`, which are right."""
    torch.manual_seed(0)
    model = layers(use, **attributes)[0].eval()
    return [site.name for site in find_sites(model, ROW)]


def body(m: Any, x: Tensor) -> Tensor:
    return m.last(m.second(tripled(m.first(x).relu())).relu())


HIDING: dict[str, Callable[[Any, Tensor], Any]] = {
    "plain": body,
    "masked by a billion": lambda m, x: body(m, x).masked_fill(torch.tensor([True, False]), -1e9),
    "mostly masked": lambda m, x: torch.cat([body(m, x)[:, :1], torch.full((len(x), 40), -1e9)], 1),
    "masked by adding": lambda m, x: torch.cat([body(m, x), body(m, x).repeat(1, 9) - 1e7], 1),
    "masked by infinity": lambda m, x: body(m, x).masked_fill(torch.tensor([True, False]), float("-inf")),
    "no number": lambda m, x: body(m, x).masked_fill(torch.tensor([True, False]), float("nan")),
    "sharp probabilities": lambda m, x: (body(m, x) * 100).softmax(1),
    "a large offset": lambda m, x: body(m, x) + 1e4,
    "another output is large": lambda m, x: (body(m, x), torch.full((2,), 1e9)),
    "a faint branch": lambda m, x: x[:, :2] + m.gamma * body(m, x),
    "a faint branch, normalised": lambda m, x: m.norm(x[:, :2] + m.gamma * body(m, x)),
}


@pytest.mark.parametrize("name", HIDING)
def test_nothing_hides_what_is_not_neutral(name: str) -> None:
    gamma = nn.Parameter(torch.full((2,), 1e-6))
    assert wrong(HIDING[name], gamma=gamma, norm=nn.BatchNorm1d(2)) == ["second"]


def test_a_faint_buffer_hides_nothing() -> None:
    class Scaled(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gamma", torch.full((2,), 1e-6))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] + self.gamma * body(self, x)  # type: ignore[operator]

    torch.manual_seed(0)
    assert [site.name for site in find_sites(Scaled().eval(), ROW)] == ["second"]


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "flip within pairs": lambda x: x.unflatten(1, (-1, 1)).flip(1).flatten(1),
    "roll": lambda x: x.roll(1, 1),
    "roll by half": lambda x: x.roll(x.shape[1] // 2, 1),
    "reversed by index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "in place": lambda x: x.copy_(x.flip(1)),
}


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 7, 16])
@pytest.mark.parametrize("name", MOVED)
def test_channels_that_change_places_are_no_site(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = Layers(lambda m, x: m.last(m.second(MOVED[name](m.first(x).relu())).relu()))
    model.first, model.second = nn.Linear(3, width), nn.Linear(width, 5)
    try:
        found = [site.name for site in find_sites(model.eval(), ROW)]
    except TraceError as error:  # one channel may have no half
        assert width == 1, error
        return
    assert found == ["second"]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6, 7, 16])
@pytest.mark.parametrize("name", MOVED)
def test_a_site_across_channels_that_change_places_is_refuted(name: str, width: int) -> None:
    """Whatever the rules say: channels in the same order on both sides are none here."""
    torch.manual_seed(0)
    model = Layers(lambda m, x: m.last(m.second(MOVED[name](m.first(x).relu())).relu()))
    model.first, model.second = nn.Linear(3, width), nn.Linear(width, 5)
    made = (Slot("first.weight", 0, Role.INCOMING), Slot("first.bias", 0, Role.BIAS))
    site = Site("first", width, (*made, Slot("second.weight", 1, Role.OUTGOING)))
    assert prove(model.eval(), ROW, [site])[0] == []


@pytest.mark.parametrize("kind", ["flag", "mask", "zero", "complex"])
def test_outputs_that_tell_nothing_do_not_matter_beside_one_that_does(kind: str) -> None:
    def use(m: Any, x: Tensor) -> Any:
        made = m.last(m.second(m.first(x).relu()).relu())
        masked = made.masked_fill(torch.tensor([False, True]), float("-inf"))
        others = {
            "flag": made > 99,
            "mask": masked,
            "zero": made.new_zeros(()),
            "complex": made.cfloat() * 1j,
        }
        return made, others[kind]

    torch.manual_seed(0)
    assert [site.name for site in find_sites(Layers(use).eval(), ROW)] == ["first", "second"]


@pytest.mark.parametrize("value", [0.0, -1e9, float("nan"), 1.0])
def test_outputs_that_do_not_depend_on_the_weights_prove_nothing(value: float) -> None:
    model = Layers(lambda m, x: torch.full_like(m.last(m.second(m.first(x).relu()).relu()), value))
    with pytest.raises(TraceError, match="prove nothing"):
        find_sites(model.eval(), ROW)


class Spiking(Layers):
    """Keeps a membrane's voltage from call to call, in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("voltage", torch.zeros(8, 6))
        self.trace: Any = 0.0
        self.steps = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.voltage = self.voltage * 0.9 + self.first(x)
        spikes = (self.voltage > 0.3).float()
        self.voltage -= 0.3 * spikes
        self.trace = self.trace + self.second(spikes + self.voltage)
        self.steps[0] += 1
        return self.last(self.trace.relu()) / self.steps[0]  # type: ignore[no-any-return]


def test_state_is_not_taken_for_randomness() -> None:
    torch.manual_seed(0)
    model = Spiking().eval()
    assert [site.name for site in find_sites(model, ROW)] == ["first", "second"]
    assert not model.voltage.any() and model.trace == 0.0 and model.steps == [0]


class Early(nn.Module):
    """Looks at values to decide which of two ways to take."""

    def __init__(self, decide: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.exit = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        self.deep, self.last = nn.Linear(6, 4), nn.Linear(4, 2)
        self.decide = decide

    def forward(self, x: Tensor) -> Any:
        early = self.decide(x)
        x = self.stem(x).relu()
        return self.exit(x) if early else self.last(self.deep(x).relu())


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x.mean() > -99,
        lambda x: float(x.sum()) > -99,
        lambda x: x.tolist()[0][0] > -99,
        lambda x: x.numpy().max() > -99,
        lambda x: len((x > -99).nonzero()),
        lambda x: len(x[x > -99]),
        lambda x: not torch.equal(x, -x),
    ],
)
def test_what_a_layer_that_did_not_run_may_read_is_left_out(decide: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    found = analyse(Early(decide).eval(), ROW)
    assert [site.name for site in found.sites] == ["exit.0"]
    reason = next(left.reason for left in found.left_out if left.layer == "stem.weight")
    assert "deep.weight, which did not run" in reason and "give an example on which it runs" in reason


def test_a_layer_that_nothing_uses_costs_no_site_where_no_value_decides() -> None:
    torch.manual_seed(0)
    assert [site.name for site in find_sites(Early(lambda x: True).eval(), ROW)] == ["stem", "exit.0"]


def test_threads_leave_the_switch_of_fused_attention_as_it_was() -> None:
    torch.manual_seed(0)
    model, errors = Layers().eval(), []

    def look() -> None:
        try:
            assert len(find_sites(model, ROW)) == 2
        except AssertionError as error:
            errors.append(error)

    before = torch.backends.mha.get_fastpath_enabled()
    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and torch.backends.mha.get_fastpath_enabled() is before


def test_inference_mode_is_followed() -> None:
    class Served(Layers):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x).relu()).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    assert [site.name for site in find_sites(Served().eval(), ROW)] == ["first", "second"]
    model = Layers().eval()
    with torch.inference_mode():
        assert [site.name for site in find_sites(model, ROW * 1)] == ["first", "second"]
