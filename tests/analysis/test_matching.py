"""Matching of channels: permuted, rescaled, widened, fine-tuned, and where nothing is to be matched."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepenc
from deepenc.analysis.matching import TRUSTED, assign, cosines, match, rescaling, sites_before
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, insert


class Chain(nn.Module):
    """Weights lie between two sites, but for the first and the last; 4 entries a channel after `conv3`."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.conv3 = nn.Conv2d(24, 20, 1)
        self.hidden = nn.Linear(80, 30)
        self.head = nn.Linear(30, classes)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.conv3(x)), 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


EXAMPLE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(scope="module")
def chain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Chain().eval()


@pytest.fixture(scope="module")
def sites(chain):
    return tuple(deepenc.find_sites(chain, EXAMPLE))


def noisy(network, layout, seed, loud=1.0):
    """The network with confusion channels of noise like its weights."""
    made, generator = insert(network, layout), torch.Generator().manual_seed(seed)
    tensors = named_tensors(made)
    with torch.no_grad():
        for site in layout.sites:
            for slot in site.slots:
                entries, tensor = layout.confusion_entries(site, slot), tensors[slot.tensor]
                shape = list(tensor.shape)
                shape[slot.dim] = len(entries)
                noise = loud * tensor.std() * torch.randn(shape, generator=generator)
                tensor.index_copy_(slot.dim, entries, noise)
    return made


def shuffled(network, sites, seed, scales=True):
    """The same function with its channels in another order and rescaled, and where they are now."""
    made, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    tensors, orders = named_tensors(made), {}
    with torch.no_grad():
        for site in sites:
            order = torch.randperm(site.width, generator=generator)
            factor = (
                (0.2 + 4 * torch.rand(site.width, generator=generator)) if scales else torch.ones(site.width)
            )
            orders[site.name] = order
            for slot in site.slots:
                tensor = tensors[slot.tensor]
                part = tensor.narrow(slot.dim, slot.start, site.width * slot.block)
                index = (order[:, None] * slot.block + torch.arange(slot.block)).flatten()
                shape = [-1 if d == slot.dim else 1 for d in range(tensor.dim())]
                power = {"incoming": 1, "bias": 1, "outgoing": -1}.get(slot.role.value, 0)
                scale = (factor**power).repeat_interleave(slot.block).view(shape)
                part.copy_((part * scale).index_select(slot.dim, index))
    return made, orders


def positions(sites, share=0.15, seed=1):
    rng = np.random.default_rng(seed)
    chosen = {}
    for site in sites:
        count = max(1, round(share * site.width))
        chosen[site.name] = tuple(sorted(rng.permutation(site.width + count)[:count].tolist()))
    return chosen


def partners(layout, orders):
    """What `match` ought to say: where each channel of the encrypted network is in the shuffled one."""
    truth = {}
    for site in layout.sites:
        inserted = set(layout.positions[site.name])
        original = itertools.count()
        inverse = {int(o): i for i, o in enumerate(orders[site.name])}
        total = site.width + len(inserted)
        truth[site.name] = [-1 if c in inserted else inverse[next(original)] for c in range(total)]
    return truth


@pytest.mark.parametrize("loud", [1.0, 10.0])
@pytest.mark.parametrize("scales", [False, True])
def test_permuted_rescaled_and_widened_networks_are_matched_exactly(chain, sites, scales, loud):
    layout = Layout(sites, positions(sites))
    other, orders = shuffled(chain, sites, 3, scales)
    found = match(
        named_tensors(noisy(chain, layout, 2, loud)), layout.widened_sites(), named_tensors(other), sites
    )
    assert {n: m.partner.tolist() for n, m in found.items()} == partners(layout, orders)
    for name, matched in found.items():
        inserted = list(layout.positions[name])
        strangeness = matched.strangeness()
        rest = torch.ones(len(strangeness), dtype=torch.bool)
        rest[inserted] = False
        assert strangeness[inserted].min() > 1.5 > 0.2 > strangeness[rest].max()


def test_the_shuffled_network_computes_the_same(chain, sites):
    other, _ = shuffled(chain, tuple(s for s in sites if s.name != "conv2"), 3)
    inputs = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(chain(inputs), other(inputs), atol=1e-5)


def test_two_releases_match_in_what_is_real(chain, sites):
    one, two = Layout(sites, positions(sites, seed=1)), Layout(sites, positions(sites, seed=2))
    tensors = named_tensors(noisy(chain, one, 5)), named_tensors(noisy(chain, two, 6))
    found = match(tensors[0], one.widened_sites(), tensors[1], two.widened_sites())
    for site in one.widened_sites():
        inserted = one.positions[site.name]
        own = [c for c in range(site.width) if c not in inserted]
        others = [c for c in range(site.width) if c not in two.positions[site.name]]
        matched = found[site.name]
        assert matched.partner[own].tolist() == others
        assert matched.cosine[own].min() > 0.999 > 0.8 > matched.cosine[list(inserted)].max()
        assert matched.pairs()[0].tolist() == own


def test_fine_tuned_networks_are_matched(chain, sites):
    tuned, generator = copy.deepcopy(chain), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    layout = Layout(sites, positions(sites))
    other, orders = shuffled(chain, sites, 3)
    found = match(named_tensors(noisy(tuned, layout, 2)), layout.widened_sites(), named_tensors(other), sites)
    assert {n: m.partner.tolist() for n, m in found.items()} == partners(layout, orders)


def test_another_head_and_other_classes_do_not_matter(chain, sites):
    other = copy.deepcopy(chain)
    other.head = nn.Linear(30, 7)
    layout = Layout(sites, positions(sites))
    found = match(named_tensors(noisy(chain, layout, 2)), layout.widened_sites(), named_tensors(other), sites)
    assert {n: m.partner.tolist() for n, m in found.items()} == partners(
        layout, {s.name: torch.arange(s.width) for s in sites}
    )


def test_independent_networks_have_nothing_in_common(chain, sites):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        stranger = Chain().eval()
    found = match(named_tensors(chain), sites, named_tensors(stranger), sites)
    assert all(float(matched.cosine.median()) < 0.6 for matched in found.values())


def test_half_precision_is_matched(chain, sites):
    layout = Layout(sites, positions(sites))
    tensors = named_tensors(noisy(chain, layout, 2).to(torch.bfloat16))
    found = match(tensors, layout.widened_sites(), named_tensors(chain), sites)
    assert {n: m.partner.tolist() for n, m in found.items()} == partners(
        layout, {s.name: torch.arange(s.width) for s in sites}
    )


def test_sites_that_the_other_network_lacks_are_left_out(chain, sites):
    found = match(named_tensors(chain), sites, named_tensors(chain), sites[1:])
    assert set(found) == {site.name for site in sites[1:]}
    assert match(named_tensors(chain), sites, {}, sites) == {}


def test_concatenated_channels_lie_elsewhere_in_the_widened_tensor():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 12, 3)
            self.third = nn.Conv2d(22, 14, 1)
            self.head = nn.Linear(14, 4)

        def forward(self, x):
            x = torch.cat([F.relu(self.first(x)), F.relu(self.second(x))], 1)
            return self.head(F.relu(self.third(x)).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = Dense().eval()
    found_sites = tuple(deepenc.find_sites(dense, EXAMPLE))
    assert len(found_sites) == 3
    layout = Layout(found_sites, positions(found_sites))
    made = named_tensors(noisy(dense, layout, 2))
    before = sites_before(layout.widened_sites(), made, named_tensors(dense))
    assert before == found_sites
    found = match(made, layout.widened_sites(), named_tensors(dense), before)
    assert {n: m.partner.tolist() for n, m in found.items()} == partners(
        layout, {s.name: torch.arange(s.width) for s in found_sites}
    )


def test_sites_before_are_the_victims(chain, sites):
    layout = Layout(sites, positions(sites))
    made = named_tensors(noisy(chain, layout, 2))
    assert sites_before(layout.widened_sites(), made, named_tensors(chain)) == sites
    assert sites_before(layout.widened_sites(), made, {}) is None
    # A network that is wider than the encrypted one cannot be the one before.
    assert sites_before(sites, named_tensors(chain), made) is None
    cut = dict(named_tensors(chain))
    cut["hidden.weight"] = cut["hidden.weight"][:, :79]  # no whole number of channels of 4 entries
    cut = {n: t for n, t in cut.items() if n == "hidden.weight"}
    assert sites_before(layout.widened_sites(), made, cut) is None


def test_cosines_are_scikit_learns():
    from sklearn.metrics.pairwise import cosine_similarity

    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert cosines(rows[:4], rows[2:]).numpy() == pytest.approx(cosine_similarity(rows[:4], rows[2:]))


def test_zero_rows_are_alike_and_like_nothing_else():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert cosines(rows, rows).tolist() == [[1.0, 0.0], [0.0, pytest.approx(1.0)]]
    assert torch.isfinite(cosines(torch.tensor([[torch.inf, 1.0]]), rows)).all()


def test_assignment_is_the_best_of_all():
    likeness = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = assign(likeness)
    best = max(
        itertools.permutations(range(5), 3), key=lambda rows: sum(likeness[r, c] for c, r in enumerate(rows))
    )
    expected = [-1] * 5
    for column, row in enumerate(best):
        expected[row] = column
    assert found.partner.tolist() == expected
    strange = found.strangeness()
    alone = found.partner < 0
    assert strange[alone].min() >= 2 >= strange[~alone].max()
    assert torch.equal(strange[alone], 3 - likeness.amax(1)[alone])


def test_doubtful_pairs_align_nothing():
    likeness = torch.diag(torch.tensor([1.0, 0.9, 0.8, 0.9 * TRUSTED - 0.1]).double())
    assert assign(likeness).pairs()[0].tolist() == [0, 1, 2]


def test_rescaling_by_hand():
    others = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.0]])
    rows = torch.cat([others * torch.tensor([4.0, 0.5]), torch.full((1, 2), 1000.0)])
    assert rescaling(rows, others, 1).tolist() == [[0.25, 2.0]]
    assert rescaling(torch.zeros(3, 2), others, 1).tolist() == [[1.0, 1.0]]
