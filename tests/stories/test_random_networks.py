"""Whatever the network, encryption can be undone, and channels that lead nowhere change nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepenc.encryption.defense import Defense, Placement, Weights
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.errors import TraceError
from deepenc.network.find import Analysis, analyse
from deepenc.network.sites import Role, Site
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, insert, remove
from tests.stories.random_networks import Plan, Random, Step
from tests.stories.strategies import plans

Positions = dict[str, tuple[int, ...]]


class Given(Placement):
    """Allocates what it is told."""

    name: ClassVar[str] = "test-given"
    counts: dict[str, int]

    def place(self, original: Any, rng: np.random.Generator) -> dict[str, int]:
        return self.counts


class Normal(Weights):
    """Normal numbers."""

    name: ClassVar[str] = "test-normal"

    def fill(self, neurons: Any, rng: np.random.Generator, channels: np.random.Generator) -> list[Tensor]:
        return [torch.from_numpy(rng.standard_normal(gap.shape)).to(gap.victim) for gap in neurons.gaps]


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = model(x)
    return [result] if isinstance(result, Tensor) else list(result)


def origins(site: Site, positions: tuple[int, ...]) -> list[int | None]:
    """For each channel of the widened site, which of the victim's it is; None for a confusion channel."""
    real = iter(range(site.width))
    return [None if p in positions else next(real) for p in range(site.width + len(positions))]


def inserted(sites: tuple[Site, ...], positions: Positions) -> dict[tuple[str, int], dict[int, Role]]:
    """(Tensor, dim) -> widened entry -> its role, for each confusion entry; counted one by one."""
    meeting = defaultdict(list)
    for site in sites:
        for slot in site.slots:
            meeting[slot.tensor, slot.dim].append((slot.start, slot, site))
    result: dict[tuple[str, int], dict[int, Role]] = {}
    for place, entries in meeting.items():
        found: dict[int, Role] = {}
        victim = widened = 0
        for start, slot, site in sorted(entries, key=lambda entry: entry[0]):
            widened += start - victim  # entries between the slots stay
            victim = start + site.width * slot.block
            for origin in origins(site, positions[site.name]):
                if origin is None:
                    found |= dict.fromkeys(range(widened, widened + slot.block), slot.role)
                widened += slot.block
        result[place] = found
    return result


def silenced(model: nn.Module, sites: tuple[Site, ...], positions: Positions) -> nn.Module:
    """The network with random confusion channels that lead nowhere."""
    network = insert(model, Layout(sites, positions))
    tensors = named_tensors(network)
    generator = torch.Generator().manual_seed(3)
    contracted = {(s.tensor, s.dim) for site in sites if site.contracted for s in site.slots}
    places = inserted(sites, positions).items()
    with torch.no_grad():
        for silent in (False, True):
            for (name, dim), entries in places:
                for entry, role in entries.items():
                    part = tensors[name].select(dim, entry)
                    if (role is Role.OUTGOING or (name, dim) in contracted) != silent:
                        continue
                    if silent:
                        part.zero_()
                    else:
                        part.copy_(torch.randn(part.shape, generator=generator).double())
                        if role is Role.VARIANCE:
                            part.abs_().add_(0.2)
    return network


def check_places(model: nn.Module, sites: tuple[Site, ...]) -> None:
    """Slots lie inside their tensors and apart from one another; names and roles are as promised."""
    tensors = named_tensors(model)
    assert len({site.name for site in sites}) == len(sites)
    taken: Counter[tuple[str, int, int]] = Counter()
    for site in sites:
        assert site.width >= 1
        assert {Role.INCOMING, Role.OUTGOING} <= {slot.role for slot in site.slots}
        for slot in site.slots:
            end = slot.start + site.width * slot.block
            assert slot.start >= 0 and slot.block >= 1 and end <= tensors[slot.tensor].shape[slot.dim]
            taken.update((slot.tensor, slot.dim, entry) for entry in range(slot.start, end))
    assert not taken or max(taken.values()) == 1


def check_silence(model: nn.Module, x: Tensor, sites: tuple[Site, ...], positions: Positions) -> None:
    expected = outputs_of(model, x)
    got = outputs_of(silenced(model, sites, positions), x)
    assert [t.shape for t in got] == [t.shape for t in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max().clamp(min=1)


def check_round_trip(model: nn.Module, x: Tensor, sites: tuple[Site, ...], counts: dict[str, int]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = outputs_of(model, x)
    defense = Defense(name="test", placement=Given(counts=counts), weights=Normal())
    encrypted, key = encrypt(model, x, defense, sites=sites, seed=0)
    for site in sites:
        assert key.allocation[site.name] == counts[site.name]
    outputs_of(encrypted, x)
    decrypted = decrypt(encrypted, key)
    for network in (model, decrypted):
        after = network.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert all(torch.equal(a, b) for a, b in zip(outputs_of(network, x), expected, strict=True))


def check_wrong_key(model: nn.Module, sites: tuple[Site, ...], positions: Positions) -> None:
    """A single channel taken for another shows."""
    network = insert(model, Layout(sites, positions))
    generator = torch.Generator().manual_seed(4)
    for (name, dim), entries in inserted(sites, positions).items():
        for entry in entries:
            part = named_tensors(network)[name].data.select(dim, entry)
            part.copy_(torch.randn(part.shape, generator=generator))
    before = model.state_dict()

    def undone(where: Positions) -> bool:
        after = remove(network, Layout(sites, where)).state_dict()
        return all(torch.equal(after[name], tensor) for name, tensor in before.items())

    assert undone(positions)
    for site in sites:
        right = positions[site.name]
        if right:
            free = sorted(set(range(site.width + len(right))) - set(right))
            wrong = tuple(sorted({*right[1:], free[len(free) // 2]}))
            assert not undone(positions | {site.name: wrong})


def draw_positions(draw: st.DrawFn, sites: tuple[Site, ...]) -> Positions:
    result = {}
    for site in sites:
        count = draw(st.integers(0, 3))
        chosen = st.sets(st.integers(0, site.width + count - 1), min_size=count, max_size=count)
        result[site.name] = tuple(sorted(draw(chosen)))
    return result


def analysed(plan: Plan, streams: bool) -> tuple[Random, Tensor, Analysis]:
    """The plan's network, an example, and what was found; passes over networks that prove nothing."""
    model = Random(plan)
    x = plan.example()
    telling = all(t.isfinite().all() and t.any() for t in outputs_of(model, x))
    try:
        found = analyse(model, x, streams=streams)
    except TraceError as error:
        assert "prove nothing" in str(error) and not telling
        assume(False)
        raise
    return model, x, found


def check(plan: Plan, streams: bool, draw: st.DrawFn) -> Analysis:
    model, x, found = analysed(plan, streams)
    sites = found.sites
    check_places(model, sites)
    assert streams or not any(site.stream for site in sites)
    if sites:
        positions = draw_positions(draw, sites)
        check_silence(model, plan.example(seed=5), sites, positions)
        if any(positions.values()):
            check_round_trip(model, x, sites, {name: len(where) for name, where in positions.items()})
        check_wrong_key(model, sites, positions)
    return found


def conv(value: int, **options: Any) -> Step:
    return Step("conv", (value,), {"kernel_size": 1, **options})


# What was found, shrunk. A probe of one number of channels at one place took these for right.
COUNTEREXAMPLES = {
    "two channels seen as two groups of one": Plan(
        (1, 2, 2),
        (conv(0, out_channels=4), conv(1, out_channels=2), Step("shuffle", (2,), {"groups": 2})),
        ((3, True),),
    ),
    "one channel seen twice, one half used": Plan(
        (2, 3, 3),
        (conv(0, out_channels=2), conv(1, out_channels=2), Step("chunk", (2,), {"parts": 2})),
        ((4, True),),
    ),
    "one channel for each group": Plan(
        (2, 3, 3),
        (conv(0, out_channels=4), conv(1, out_channels=2, groups=2)),
        ((2, True),),
    ),
}


@pytest.mark.parametrize("name", COUNTEREXAMPLES)
@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_counterexamples(name: str, count: int, end: bool) -> None:
    model, x, found = analysed(COUNTEREXAMPLES[name], streams=True)
    check_places(model, found.sites)
    for site in found.sites:
        start = site.width if end else 0
        positions = {s.name: () for s in found.sites} | {site.name: tuple(range(start, start + count))}
        check_silence(model, x, found.sites, positions)


def run(examples: int, *phases: Phase) -> list[Analysis]:
    """Check that many random networks; what was found in each. Shrinking a failure takes minutes."""
    found: list[Analysis] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate, *phases),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans(), st.booleans(), st.data())
    def explore(plan: Plan, streams: bool, data: st.DataObject) -> None:
        found.append(check(plan, streams, data.draw))

    explore()
    return found


def check_worth(found: list[Analysis]) -> None:
    """Most networks must have sites, or the properties hold of nothing; few probes may fail."""
    assert sum(bool(analysis.sites) for analysis in found) >= len(found) / 2


def test_random_networks() -> None:
    check_worth(run(80))


@pytest.mark.long
def test_many_random_networks() -> None:
    check_worth(run(1000, Phase.shrink))
