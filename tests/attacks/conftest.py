"""Planted cases: a small network, confusion channels whose place and content the test chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from deepenc.arena.case import Case, Release
from deepenc.arena.oracle import Oracle
from deepenc.arena.threat import Meter, Threat
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout, insert
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit


class Toy(nn.Module):
    """Two convolutions and a classifier; a flattened 2x2 map before it, so that a block has 4 entries."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.linear = nn.Linear(width * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 2)
        return self.linear(x.flatten(1))


def toy_sites(width: int) -> tuple[Site, ...]:
    norm = (("weight", Role.SCALE), ("bias", Role.SHIFT), ("running_mean", Role.MEAN))
    first = (
        Slot("conv1.weight", 0, Role.INCOMING),
        *(Slot(f"bn1.{name}", 0, role) for name, role in norm),
        Slot("bn1.running_var", 0, Role.VARIANCE),
        Slot("conv2.weight", 1, Role.OUTGOING),
    )
    second = (
        Slot("conv2.weight", 0, Role.INCOMING),
        Slot("conv2.bias", 0, Role.BIAS),
        Slot("linear.weight", 1, Role.OUTGOING, block=4),
    )
    return Site("conv1", width, first), Site("conv2", width, second)


def toy_images(count: int, seed: int) -> Examples:
    """Four classes: which quarter of the image is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    inputs = 0.5 * torch.randn(count, 1, 6, 6, generator=generator)
    for image, label in zip(inputs, labels.tolist(), strict=True):
        image[0, 3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 1.5
    return Examples(inputs, labels)


Fill = Callable[[Slot, tuple[int, ...], Tensor, torch.Generator], Tensor]
"""Slot, shape wanted, the victim's tensor, randomness -> the confusion entries."""


def typical(slot: Slot, shape: tuple[int, ...], victim: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal entries with the victim's own mean and deviation; variances stay positive."""
    values = victim.mean() + victim.std() * torch.randn(shape, generator=generator)
    return values.abs() if slot.role is Role.VARIANCE else values


@dataclass
class Planted:
    """A case and what its attacker does not see."""

    case: Case
    original: nn.Module
    positions: dict[str, tuple[int, ...]]
    judge: Examples

    def accuracy(self, network: nn.Module | None) -> float:
        """Share of the judge's images that a network gets right."""
        assert network is not None and not network.training
        with torch.no_grad():
            return float((network(self.judge.inputs).argmax(1) == self.judge.targets).float().mean())

    def auc(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """Per site, scikit-learn's AUC of the scores."""
        found = {}
        for name, chosen in self.positions.items():
            truth = torch.zeros(len(scores[name]))
            truth[list(chosen)] = 1
            found[name] = roc_auc_score(truth, scores[name])
        return found


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    """A toy network that does its task."""
    torch.manual_seed(0)
    network = Toy()
    assert fit(
        network,
        Classification(),
        toy_images(200, 0),
        Recipe(steps=60, lr=0.1),
        torch.Generator().manual_seed(0),
    )
    return network


Plant = Callable[..., Planted]


@pytest.fixture
def plant(trained: nn.Module) -> Plant:
    """Make a case from positions and a fill."""

    def make(
        fill: Fill = typical,
        *,
        network: nn.Module | None = None,
        width: int = 12,
        positions: dict[str, tuple[int, ...]] | None = None,
        known: dict[str, tuple[int, ...]] | None = None,
        seed: int = 5,
        public: nn.Module | None = None,
        releases: tuple[Release, ...] = (),
        **threat: object,
    ) -> Planted:
        original = trained if network is None else network
        chosen = {"conv1": (1, 4, 9), "conv2": (0, 8)} if positions is None else positions
        layout = Layout(toy_sites(width), chosen)
        encrypted = insert(original, layout).eval()
        generator = torch.Generator().manual_seed(seed)
        own, state = original.state_dict(), encrypted.state_dict()
        for site in layout.sites:
            for slot in site.slots:
                if chosen.get(site.name):
                    entries = layout.confusion_entries(site, slot)
                    shape = list(state[slot.tensor].shape)
                    shape[slot.dim] = len(entries)
                    values = fill(slot, tuple(shape), own[slot.tensor], generator)
                    state[slot.tensor].index_copy_(slot.dim, entries, values)
        model = Threat(name="test", **{"key_fraction": 0.5 if known else 0.0} | threat)  # type: ignore[arg-type]
        meter = Meter(model)
        meter.watch(encrypted)

        def blank(chosen_seed: int) -> nn.Module:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(chosen_seed)
                return meter.watch(Toy(width).train())

        images = toy_images(model.labelled + model.unlabelled, 1)
        case = Case(
            encrypted=encrypted,
            sites=layout.widened_sites(),
            allocation={k: len(v) for k, v in chosen.items()} if model.allocation else None,
            known=known or {},
            labelled=images[: model.labelled],
            unlabelled=images[model.labelled :].without_targets(),
            task=Classification(classes=4),
            example=torch.zeros(1, 1, 6, 6),
            defense={"name": "planted"},
            threat=model,
            seed=seed,
            device=torch.device("cpu"),
            meter=meter,
            blank=blank if model.architecture else None,
            public=public,
            oracle=Oracle(original, Classification(classes=4), torch.device("cpu"), meter)
            if model.oracle
            else None,
            releases=releases,
        )
        return Planted(case, original, chosen, toy_images(400, 2))

    return make


@pytest.fixture
def random_network() -> Callable[[int], nn.Module]:
    """A network all of whose weights are independent and normal, as `typical` makes them."""

    def make(width: int) -> nn.Module:
        network = Toy(width)
        generator = torch.Generator().manual_seed(3)
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        return network.eval()

    return make
