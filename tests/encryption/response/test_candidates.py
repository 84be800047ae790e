from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from deepenc.encryption.cost.budget import Budget, Ledger
from deepenc.encryption.defense import Original, Weights
from deepenc.encryption.response.ascent import climb
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.objective import Response, response_change
from deepenc.errors import ConfigError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout, narrow_sites, remove
from deepenc.plugins import build
from deepenc.victims.models import CifarResNet

Net = tuple[nn.Module, Tensor, tuple[Site, ...]]
MOST = 4


def candidates(net: Net, **options: object) -> Candidates:
    model, inputs, sites = net
    weights = build("weights", "samp")
    assert isinstance(weights, Weights)
    most = {site.name: MOST for site in sites}
    original = Original(model, sites, inputs[:1], inputs)
    return Candidates.of(original, weights, np.random.default_rng(0), most, **options)  # type: ignore[arg-type]


def slow(
    found: Candidates, net: Net, counts: dict[str, int], images: Tensor, measure: str = "logits"
) -> Response:
    """The encrypted network with most channels, surplus ones taken out by surgery, and run whole."""
    wide = found.network(found.most)
    widths = {site.name: (site.width + counts[site.name], site.width + MOST) for site in net[2]}
    surplus = {name: tuple(range(*ends)) for name, ends in widths.items()}
    layout = Layout(net[2], {site.name: tuple(range(site.width, site.width + MOST)) for site in net[2]})
    sites = narrow_sites(layout.widened_sites(), {name: gone for name, gone in surplus.items() if gone})
    places = {site.name: tuple(range(site.width, site.width + counts[site.name])) for site in net[2]}
    encrypted = remove(wide, Layout(sites, surplus))
    return response_change(net[0], encrypted, images, measure=measure, layout=Layout(net[2], places))


def check(net: Net, *, fast: bool, measure: str = "logits") -> None:
    found = candidates(net, batch_size=4, measure=measure)
    assert found.fast == fast
    images = torch.cat(list(found.batches))
    rng = np.random.default_rng(1)
    asked = [{s.name: int(rng.integers(0, MOST + 1)) for s in net[2]} for _ in range(4)]
    wanted = [slow(found, net, counts, images, measure) for counts in asked]
    for counts, want in zip(asked, wanted, strict=True):
        assert_same(found.response(counts), want)
    for got, want in zip(found.responses(asked), wanted, strict=True):
        assert_same(got, want)
    base = {site.name: 1 for site in net[2]}
    base[net[2][0].name] = MOST
    found.rebase(base)
    for site in net[2][1:]:
        more = {**base, site.name: 2}
        assert_same(found.response(more), slow(found, net, more, images, measure))
    assert_same(found.rebase({}), Response(0, 0, 0))


def assert_same(got: Response, want: Response) -> None:
    for name in ("l2", "squared", "relative"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4, abs=1e-9)


def test_agrees_with_surgery_however_channels_lie(net: Net) -> None:
    check(net, fast=True)


def traced(model: nn.Module, *shape: int) -> Net:
    inputs = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # heads start with zeros
        if not parameter.any():
            nn.init.normal_(parameter)
    model.eval()
    return model, inputs, tuple(find_sites(model, inputs[:1]))


@pytest.fixture
def resnet() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return traced(CifarResNet(14, channels=1), 1, 8, 8)


def test_agrees_with_surgery_in_a_residual_network(resnet: Net) -> None:
    check(resnet, fast=True)


def test_agrees_with_surgery_in_torchvision_where_operators_write_in_place() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = traced(torchvision.models.resnet18(num_classes=10), 3, 32, 32)
        check((net[0], net[1][:4], net[2]), fast=True)


def test_agrees_with_surgery_in_transformers() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=5)
        net = traced(model, 3, 16, 16)
    # Heads with confusion channels are computed by other operators than those without.
    check(net, fast=True)
    hidden = tuple(site for site in net[2] if ".mlp." in site.name)
    assert len(hidden) == 2
    check((net[0], net[1], hidden), fast=True)


class Data(nn.Module):
    """The sign of the data decides."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out if out.sum() > 0 else -out


def test_networks_that_data_steer_are_run_whole() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        inputs = torch.randn(8, 3)
    sites = tuple(find_sites(inner, inputs[:1]))
    found = candidates((Data(inner).eval(), inputs, renamed(sites)))
    assert not found.fast
    check((Data(inner).eval(), inputs, renamed(sites)), fast=False)


def renamed(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    return tuple(
        replace(s, slots=tuple(replace(t, tensor=f"inner.{t.tensor}") for t in s.slots)) for s in sites
    )


def test_only_what_changes_is_run(resnet: Net) -> None:
    found = candidates(resnet)
    program = found._program
    assert program is not None
    work = [int(program.reached[site.name].sum()) for site in resnet[2]]
    assert work == sorted(work, reverse=True)
    assert work[-1] < 0.2 * program.needed.sum()
    base = found.rebase({}), found._last_state
    assert base[1] is not None
    found.response({resnet[2][-1].name: 2})
    state = found._last_state
    assert state is not None
    same = [a is b for a, b in zip(base[1].results[0], state.results[0], strict=True)]
    assert len(same) - sum(same) == work[-1]


def test_probabilities(small: Net) -> None:
    model, _, sites = small
    found = candidates(small, measure="probabilities")
    counts = {site.name: 3 for site in sites}
    images = torch.cat(list(found.batches))
    with torch.no_grad():
        clean, changed = model(images).softmax(1), found.network(counts)(images).softmax(1)
    assert found.response(counts).l2 == pytest.approx((clean - changed).norm(dim=1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("measure", ["features", "features:layer2"])
def test_features_in_a_residual_network(resnet: Net, measure: str) -> None:
    check(resnet, fast=True, measure=measure)
    found, whole = candidates(resnet, measure=measure), candidates(resnet)
    assert found._program is not None and whole._program is not None
    assert found._program.needed.sum() < whole._program.needed.sum()  # what lies behind is not run
    last = resnet[2][-1].name
    assert (found.response({last: 2}).l2 > 0) == (measure == "features")  # no site behind a layer changes it


@pytest.mark.parametrize("fast", [True, False])
def test_features_leave_confusion_channels_out(small: Net, fast: bool) -> None:
    """The one site's own channels are what goes into the last Linear: none of the victim's changes."""
    found = candidates(small, measure="features", cache=2**30 if fast else 1)
    assert found.fast == fast
    assert found.response({small[2][0].name: 3}) == Response(0, 0, 0)
    assert candidates(small, cache=2**30 if fast else 1).response({small[2][0].name: 3}).l2 > 0


def test_features_behind_which_data_steer(small: Net) -> None:
    """Where data decide after the features were made, the network is run whole all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        inputs = torch.randn(8, 3)
    sites = tuple(find_sites(inner, inputs[:1]))
    check((Data(inner).eval(), inputs, renamed(sites)), fast=False, measure="features")


def test_little_memory_is_kept_to(resnet: Net) -> None:
    found = candidates(resnet, cache=1000)
    counts = {site.name: 2 for site in resnet[2]}
    assert not found.fast
    assert_same(found.response(counts), candidates(resnet).response(counts))


def test_what_cannot_be_asked(small: Net) -> None:
    model, inputs, sites = small
    found = candidates(small)
    with pytest.raises(ConfigError, match="0 to 4 channels at site '0', got 5"):
        found.response({"0": 5})
    weights = build("weights", "samp")
    for data, most, words in (
        (None, {"0": 1}, "data="), (inputs, {"0": 0}, "above 0"), (inputs, {"nine": 1}, "for sites"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Candidates.of(Original(model, sites, inputs, data), weights, np.random.default_rng(0), most)
    with pytest.raises(ConfigError, match="no layer 'norm'"):
        candidates(small, measure="features:norm")
    with pytest.raises(ConfigError, match="name a layer behind the site"):
        candidates(small, measure="features:1").response({"0": 1})
    with pytest.raises(ConfigError, match="eval"):
        candidates((model.train(), inputs, sites))
    model.eval()


@dataclass
class Planted:
    """Responses that add up, each concave: roots of counts."""

    weights: dict[str, float]
    most: dict[str, int] = field(default_factory=lambda: {"0": 50, "2": 50})
    runs: int = 0

    def response(self, allocation: dict[str, int]) -> Response:
        self.runs += 1
        value = sum(self.weights[name] * count**0.5 for name, count in allocation.items())
        return Response(value, value, value)

    rebase = response


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.0])
def test_climbing_takes_the_best_step_each_time(two_sites: Net, weight: float) -> None:
    ledger = Ledger(Original(two_sites[0], two_sites[2], two_sites[1]), Budget(share=2.0))
    planted = Planted({"0": 1.0, "2": weight})
    counts = {"0": 0, "2": 0}
    while True:
        scores = {}
        for name in counts:
            more = {**counts, name: counts[name] + 1}
            if ledger.cost(more) <= ledger.limit:
                change = planted.response(more).l2 - planted.response(counts).l2
                scores[name] = change / ledger.price(counts, name)
        if not scores:
            break
        counts[max(scores, key=lambda name: scores[name])] += 1
    found = climb(planted, ledger, {})  # type: ignore[arg-type]
    assert found == {name: count for name, count in counts.items() if count}
    few = climb(planted, ledger, {}, enough=2.5)  # type: ignore[arg-type]
    assert planted.response(few).l2 >= 2.5
    assert sum(few.values()) < sum(found.values())
    steps = climb(planted, ledger, {}, step=3)  # type: ignore[arg-type]
    assert ledger.cost(steps) <= ledger.limit
    assert all(ledger.room(steps, name) == 0 for name in counts)
