"""Whether a guess of one site's key agrees with the BatchNorm statistics of the layers behind it.

The stored statistics of the channels behind a site describe the victim, not the encrypted network. So a
guess of a site's confusion channels can be checked alone, without the rest of the key: with the right ones
silenced, what the consumers of the site compute has the stored mean and variance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from deepenc import trees
from deepenc.analysis.batchnorm import Moments, batchnorms, distance, stored
from deepenc.analysis.readers import (
    ENTRIES,
    Consumer,
    NormedConsumer,
    contributions,
    groups_of,
    outgoing,
    readers,
    silenced,
)
from deepenc.errors import SiteError
from deepenc.network.calling import call, removed
from deepenc.network.sites import Role, Site, Slot

GUESSES = 4096
"""Guesses of an exhaustive search that are made at once."""
SECONDS = 2**26
"""Second moments kept for a site: of the rows behind it fewer are used where there would be more."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the statistics behind a site say of guesses of its key; every guess is answered exactly.

    What consumers read of other sites, they read in every guess: it is one more channel, the last, that is
    always kept.

    Attributes:
        first: Mean contribution of every channel to every row behind, ``(rows, width + 1)``, float64.
        second: Mean products of contributions, ``(rows, width + 1, width + 1)``.
        bias: Of the rows, ``(rows,)``.
        stored: Their stored statistics.
        own: What keeping a channel costs by itself, ``(width,)``: the distance of its own statistics.
        eps: Of the rows' BatchNorm, ``(rows,)``.
    """

    first: Tensor
    second: Tensor
    bias: Tensor
    stored: Moments
    own: Tensor
    eps: Tensor

    @property
    def width(self) -> int:
        """Channels of the site."""
        return len(self.own)

    def losses(self, kept: Tensor) -> Tensor:
        """How implausible guesses are.

        Args:
            kept: Which channels are real, ``(guesses, width)``, bool.

        Returns:
            ``(guesses,)``, 0 where everything agrees.
        """
        step = max(1, ENTRIES // max(1, self.first.numel()))
        parts = []
        for part in torch.split(kept, step):
            mask = F.pad(part.to(self.first), (0, 1), value=1.0)
            square = torch.einsum("rgh,bg,bh->br", self.second, mask, mask)
            own = (part.to(self.own) * self.own).sum(1)
            parts.append(self._loss(mask @ self.first.T, square, own))
        return torch.cat(parts)

    def loss(self, kept: Tensor) -> float:
        """How implausible one guess is, ``(width,)``."""
        return float(self.losses(kept[None])[0])

    def best(self, count: int) -> Tensor:
        """The most plausible of all guesses that remove so many channels, ``(width,)``; exhaustive search."""
        chosen = itertools.combinations(range(self.width), count)
        kept, lowest = torch.ones(self.width, dtype=torch.bool, device=self.own.device), math.inf
        while part := list(itertools.islice(chosen, GUESSES)):
            guesses = kept.new_ones(len(part), self.width)
            guesses.scatter_(1, torch.tensor(part, dtype=torch.int64, device=kept.device), False)
            least, index = self.losses(guesses).min(0)
            if float(least) < lowest:
                kept, lowest = guesses[index], float(least)
        return kept

    def flips(self, kept: Tensor) -> Tensor:
        """Losses of the guesses that differ from this one in one channel each, ``(width,)``."""
        sign, mean, square, cross, own = self._around(kept)
        diagonal = self.second.diagonal(dim1=1, dim2=2)[:, :-1]
        means = mean[:, None] + sign * self.first[:, :-1]
        squares = square[:, None] + 2 * sign * cross + diagonal
        return self._loss(means.T, squares.T, own + sign * self.own)

    def swaps(self, kept: Tensor) -> Tensor:
        """Losses of the guesses in which one removed channel and one kept one change places.

        Returns:
            ``(removed, kept)``, both in ascending order of channels.
        """
        sign, mean, square, cross, own = self._around(kept)
        result = []
        diagonal = self.second.diagonal(dim1=1, dim2=2)[:, :-1]
        for back in (~kept).nonzero().flatten():
            means = mean[:, None] + self.first[:, :-1] * sign + self.first[:, back, None]
            squares = square[:, None] + 2 * sign * cross + diagonal
            squares = squares + (2 * cross + diagonal)[:, back, None] + 2 * sign * self.second[:, back, :-1]
            result.append(self._loss(means.T, squares.T, own + sign * self.own + self.own[back])[kept])
        return torch.stack(result) if result else self.own.new_empty(0, int(kept.sum()))

    def _around(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of a guess: what a flip of each channel adds, mean, square, cross products, and own cost."""
        mask = F.pad(kept.to(self.first), (0, 1), value=1.0)
        cross = self.second @ mask
        own = (mask[:-1] * self.own).sum()
        return 1 - 2 * mask[:-1], self.first @ mask, cross @ mask, cross[:, :-1], own

    def _loss(self, mean: Tensor, square: Tensor, own: Tensor) -> Tensor:
        """From ``(guesses, rows)``, and the own cost ``(guesses,)``, to ``(guesses,)``."""
        measured = Moments(mean + self.bias, square - mean**2)
        # The logarithm keeps rows that are confusion channels themselves from deciding.
        rows = distance(measured, self.stored, self.eps).log1p().sum(1)
        return (rows + own) / max(1, len(self.bias))


Solve = Callable[[Site, Evidence], Sequence[int]]


def decode(
    network: nn.Module, sites: Sequence[Site], inputs: Any, solve: Solve, *, own: float = 1.0
) -> dict[str, tuple[int, ...]]:
    """Decide on one site after the other, each on evidence that those before it no longer spoil.

    One pass over the network: as soon as the inputs of a site's first consumer are there, `solve` is asked
    which channels to remove, and the network goes on without them.

    Args:
        network: In eval mode; it stays as it is. Its hooks run, for at most two inputs more than given.
        sites: Its sites.
        inputs: A batch, run at once.
        solve: From a site and its evidence to the channels to remove.
        own: Weight of the channels' own statistics beside those of the rows behind; where there are no such
            rows, they decide alone.

    Returns:
        Site name to the removed channels, ascending, of the sites that could be checked.
    """
    run = _Pass(network, readers(network, sites, trees.take(inputs, slice(2))), solve, own)
    modules = dict(network.named_modules())
    handles = [layer.register_forward_pre_hook(run.normalised) for layer in batchnorms(network).values()]
    for site in sites:
        for path, slot in outgoing(modules, site):
            handles.append(modules[path].register_forward_pre_hook(partial(run.read, site, slot)))
    with removed(handles), torch.no_grad():
        call(network, inputs)
    return run.gone


def evidence_of(network: nn.Module, site: Site, inputs: Any, *, own: float = 1.0) -> Evidence:
    """The evidence on one site, the rest of the network as it is.

    Args:
        network: As for `decode`; without the confusion channels of the sites before, the better they are
            known, the better.
        site: The site.
        inputs: A batch.
        own: As for `decode`.

    Raises:
        SiteError: No BatchNorm normalises what the site's consumers make.
    """
    found: list[Evidence] = []

    def keep(_: Site, evidence: Evidence) -> Sequence[int]:
        found.append(evidence)
        return ()

    decode(network, [site], inputs, keep, own=own)
    if not found:
        raise SiteError(
            f"site {site.name!r}: no layer that reads it is followed by a BatchNorm with running statistics; "
            "a guess of its key cannot be checked"
        )
    return found[0]


def verify(network: nn.Module, site: Site, channels: Sequence[int], inputs: Any) -> float:
    """How implausible it is that these are a site's confusion channels; 0 where everything agrees.

    Since it needs no other site's key, a key is found site by site: the cost of a search is the sum of the
    sites' costs, not the product.

    Args:
        network: As for `evidence_of`.
        site: The site.
        channels: Supposed confusion channels.
        inputs: Unlabelled inputs, ``(images, ...)``.

    Raises:
        SiteError: As for `evidence_of`.
    """
    evidence = evidence_of(network, site, inputs)
    kept = torch.ones(site.width, dtype=torch.bool, device=evidence.own.device)
    kept[list(channels)] = False
    return evidence.loss(kept)


@dataclass(eq=False)
class _Pass:
    """One pass of `decode`.

    Attributes:
        seen: Distance of each BatchNorm's inputs from its statistics.
        gone: Site name to the channels that are removed.
    """

    network: nn.Module
    readers: Mapping[str, Sequence[NormedConsumer]]
    solve: Solve
    weight: float
    seen: dict[nn.Module, Tensor] = field(default_factory=dict)
    gone: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = dict(self.network.named_modules())

    def normalised(self, layer: nn.Module, given: tuple[Any, ...]) -> None:
        """A BatchNorm gets its input."""
        norm = cast(_BatchNorm, layer)
        if given:
            self.seen[layer] = distance(Moments.of(given[0]), stored(norm), norm.eps).log1p()

    def read(self, site: Site, slot: Slot, consumer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """A consumer gets its input: what it shall get instead, the channels removed so far being zero."""
        if not given:  # called by keyword
            return given
        group = self.readers.get(site.name, ())
        awaited = not group or any(slot == reader.slot for reader in group)
        if awaited and site.name not in self.gone:
            own = self.own(site, given[0].device) * (self.weight if group else 1.0)
            if group or bool(own.any()):
                evidence = collect(self.network, site, group, given[0], own)
                self.gone[site.name] = tuple(sorted(int(c) for c in self.solve(site, evidence)))
        return (silenced(given[0], consumer, slot, self.gone.get(site.name, ())), *given[1:])

    def own(self, site: Site, device: torch.device) -> Tensor:
        """What the site's own BatchNorm layers say of its channels, ``(width,)``."""
        costs = [torch.zeros(site.width, dtype=torch.float64, device=device)]
        for slot in site.slots:
            layer = self.modules.get(slot.module)
            if slot.role is Role.MEAN and layer in self.seen:
                cost = slot.rows(self.seen[layer], site.width)
                costs.append(cost.mean(1))
        return torch.stack(costs[1:] or costs).mean(0)


def collect(
    network: nn.Module, site: Site, group: Sequence[NormedConsumer], values: Tensor, own: Tensor
) -> Evidence:
    """Measure what every channel contributes to the rows behind a site.

    Args:
        network: The network.
        site: The site.
        group: Readers that run on the same input; where there are none, only the own cost counts.
        values: This input, ``(images, channels, ...)``.
        own: See `Evidence`.
    """
    parts = [(*(own.new_zeros(0, *[site.width + 1] * n) for n in (1, 2)), *own.new_zeros(4, 0))]
    for reader in group:
        consumer = cast(Consumer, network.get_submodule(reader.consumer))
        norm = cast(_BatchNorm, network.get_submodule(reader.norm))
        rows = _rows(consumer.weight.shape[0], site.width, values.device)
        groups = groups_of(consumer, reader.slot, site.width)
        first, second = contributions(consumer, rows, values, groups, site.width + 1)
        bias = own.new_zeros(len(rows)) if consumer.bias is None else consumer.bias.detach()[rows].double()
        kept, at = stored(norm), rows + reader.first
        eps = own.new_full((len(rows),), norm.eps)
        parts.append((first, second, bias, kept.mean[at], kept.variance[at], eps))
    first, second, bias, mean, variance, eps = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evidence(first, second, bias, Moments(mean, variance), own, eps)


def _rows(count: int, width: int, device: torch.device) -> Tensor:
    """The rows of a consumer that are used, spread evenly where they are too many."""
    used = min(count, max(1, SECONDS // (width + 1) ** 2))
    return torch.arange(used, device=device) * count // used
