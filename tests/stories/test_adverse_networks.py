"""Networks made to deceive: what is found is neutral at places nobody tried, and nobody's network changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepenc.errors import DeepencError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import Layout, insert, remove
from tests.stories.random_networks import Plan, Random, channel_dim
from tests.stories.strategies import plans
from tests.stories.test_random_networks import check_silence, draw_positions


def _part(x: Tensor, dim: int) -> Tensor:
    """A view of the first entries, their number written down."""
    return x.narrow(dim, 0, min(2, x.shape[dim]))


def _louder_in_part(x: Tensor, dim: int) -> Tensor:
    x = x.clone()
    _part(x, dim).mul_(3)
    return x


def _halves(x: Tensor, dim: int) -> Tensor:
    half = x.shape[dim] // 2
    return torch.cat([x.narrow(dim, half, x.shape[dim] - half), x.narrow(dim, 0, half)], dim)


def _ranked(x: Tensor, dim: int) -> Tensor:
    """Each channel by its place among all."""
    places = torch.linspace(1, 2, x.shape[dim], dtype=x.dtype, device=x.device)
    return x * places.view([-1 if d == dim else 1 for d in range(x.dim())])


TWISTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "none": lambda x, dim: x,
    "flip": lambda x, dim: x.flip(dim),
    "flip in place": lambda x, dim: x.clone().copy_(x.flip(dim)),
    "roll": lambda x, dim: x.roll(1, dim),
    "roll by half": lambda x, dim: x.roll(x.shape[dim] // 2, dim),
    "halves": _halves,
    "part": _louder_in_part,
    "ranked": _ranked,
    "own width": lambda x, dim: x * x.shape[dim] ** -0.5,
    "first for all": lambda x, dim: x + x.narrow(dim, 0, 1),
    "last for all": lambda x, dim: x - x.narrow(dim, x.shape[dim] - 1, 1),
    "sorted": lambda x, dim: x.sort(dim).values,
    "mean": lambda x, dim: x - x.mean(dim, keepdim=True),
    "largest": lambda x, dim: x / (1 + x.abs().amax(dim, keepdim=True)),
}
VEILS: dict[str, Callable[[Any, Tensor], Any]] = {
    "none": lambda m, x: x,
    "billion": lambda m, x: x.where(_first(x), torch.full_like(x, -1e9)),
    "infinity": lambda m, x: x.where(_first(x), torch.full_like(x, float("-inf"))),
    "added": lambda m, x: torch.cat([x.flatten(), (x.repeat_interleave(3) - 1e6)]),
    "offset": lambda m, x: x + 1e5,
    "faint": lambda m, x: x * m.gamma,
    "faint beside loud": lambda m, x: torch.cat([x.flatten() * m.gamma, 1 + m.gamma.abs().sqrt().view(1)]),
    "beside": lambda m, x: (x, torch.full((3,), 1e9), x.new_zeros(2), x > 1e9),
}


def _first(x: Tensor) -> Tensor:
    return torch.arange(x.numel()).view(x.shape) % 7 == 0


@dataclass(frozen=True)
class Trick:
    """What is done to a random network: to one of its values, to its outputs, to the way it is called."""

    step: int
    twist: str
    veil: str
    habit: str


HABITS = ["none", "none", "none", "patched", "hook", "writer", "state", "list", "class", "example"]
KEPT: dict[Any, Tensor] = {}


class Adverse(Random):
    """A random network with a trick; `veiled` is taken off to see what is behind."""

    def __init__(self, plan: Plan, trick: Trick, seed: int = 0) -> None:
        super().__init__(plan, seed)
        self.trick, self.veiled, self.seen = trick, True, [0.0]
        self.gamma = nn.Parameter(torch.tensor(1e-6, dtype=torch.float64))
        self.register_buffer("sum", torch.zeros((), dtype=torch.float64))
        target = self.steps[trick.step % len(self.steps)]
        if trick.habit == "patched":
            before = target.forward
            target.forward = lambda *values: before(*values)
        elif trick.habit == "hook":
            weight = next(target.parameters(), torch.zeros(()))
            target.register_forward_hook(lambda m, a, made: made, with_kwargs=False)
            target.register_forward_pre_hook(lambda m, a, own=weight: None)
        elif trick.habit == "list":
            self.aside = [copy.deepcopy(target)]

    def forward(self, x: Tensor) -> Any:
        habit, number = self.trick.habit, self.trick.step % len(self.steps)
        if habit == "example" and x.is_floating_point():
            x.mul_(0.5)
        values = [x]
        for place, (step, module) in enumerate(zip(self.plan.steps, self.steps, strict=True)):
            if place == number and habit == "writer":
                for parameter in list(module.parameters())[:1]:
                    parameter.data.mul_(0.9)
            if place == number and habit == "list":
                module = self.aside[0]
            result = module(*(values[i] for i in step.inputs))
            results = [result] if isinstance(result, Tensor) else list(result)
            if place == number:
                results = [TWISTS[self.trick.twist](r, channel_dim(tuple(r.shape))) for r in results]
                if habit == "state":
                    self.sum = self.sum + results[0].mean()
                    self.seen[0] += 1.0
                    results[0] = results[0] + self.sum * self.seen[0]
                elif habit == "class":
                    size = results[0].shape[-1]
                    if size not in KEPT:
                        KEPT[size] = torch.linspace(1, 2, size, dtype=x.dtype, device=x.device).double()
                    results[0] = results[0] * KEPT[size].mean()
            values += results
        outputs = [head(values[i]) for (i, _), head in zip(self.plan.outputs, self.heads, strict=True)]
        return VEILS[self.trick.veil](self, outputs[0]) if self.veiled else outputs[0]


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        made = copy.deepcopy(model)(x.clone())
    return [made] if isinstance(made, Tensor) else list(made)


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors]


def check(plan: Plan, trick: Trick, draw: st.DrawFn) -> tuple[Site, ...] | None:
    """The sites found, or None where the network was refused."""
    KEPT.clear()
    model, x = Adverse(plan, trick), plan.example()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, given = bits(outputs_of(model, x)), x.clone()
    KEPT.clear()
    sites: tuple[Site, ...] | None
    try:
        sites = tuple(find_sites(model, x))
    except DeepencError:
        sites = None
    assert not KEPT and torch.equal(x, given) and model.seen == [0.0]
    assert bits(list(model.state_dict().values())) == bits(list(state.values()))
    assert bits(outputs_of(model, x)) == before
    assert (
        trick.habit != "writer"
        or sites is None
        or not list(model.steps[trick.step % len(model.steps)].parameters())
    )
    if sites:
        where = draw_positions(draw, sites)
        layout = Layout(sites, where)
        _check_silence(model, plan.example(seed=5), sites, where)
        check_other_values(plan, trick, model, layout, x)
    return sites


def _check_silence(
    model: nn.Module, x: Tensor, sites: tuple[Site, ...], where: dict[str, tuple[int, ...]]
) -> None:
    network = copy.deepcopy(model)
    network.veiled = False
    with torch.no_grad():
        network.gamma.fill_(1.0)
    check_silence(Fresh(network), x, tuple(_moved(site) for site in sites), where)


class Fresh(nn.Module):
    """Runs a copy of a network each time, so that no call finds what an earlier one has left."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return copy.deepcopy(self.network)(x.clone())


def _moved(site: Site) -> Site:
    return replace(
        site,
        slots=tuple(replace(slot, tensor=f"network.{slot.tensor}") for slot in site.slots),
        settings=tuple(replace(s, module=f"network.{s.module}") for s in site.settings),
    )


def check_other_values(plan: Plan, trick: Trick, model: nn.Module, layout: Layout, x: Tensor) -> None:
    """From disk: the tensors in the structure that the same code makes, with other weights at first."""
    widened = insert(model, layout)
    elsewhere = replace_tensors(Adverse(plan, trick, seed=1), named_tensors(widened))
    assert bits(outputs_of(elsewhere, x)) == bits(outputs_of(widened, x))
    assert bits(outputs_of(remove(elsewhere, layout), x)) == bits(outputs_of(model, x))


def run(examples: int, *phases: Phase) -> list[tuple[Trick, tuple[Site, ...] | None]]:
    found: list[tuple[Trick, tuple[Site, ...] | None]] = []
    tricks = st.builds(
        Trick,
        st.integers(0, 11),
        st.sampled_from(sorted(TWISTS)),
        st.sampled_from(sorted(VEILS)),
        st.sampled_from(HABITS),
    )

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, *phases),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans(), tricks, st.data())
    def explore(plan: Plan, trick: Trick, data: st.DataObject) -> None:
        if plan.steps:
            found.append((trick, check(plan, trick, data.draw)))

    explore()
    return found


def test_adverse_networks() -> None:
    found = run(20)
    assert sum(bool(sites) for _, sites in found) >= len(found) / 8


@pytest.mark.long
def test_many_adverse_networks() -> None:
    found = run(2000)
    assert sum(bool(sites) for _, sites in found) >= len(found) / 8
