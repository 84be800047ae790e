"""Which channels of two networks are the same, whatever was inserted, permuted or rescaled in between.

A channel is known by the directions of its weights: they survive a permutation of the channels, a positive
factor on each, and a little fine-tuning; nothing inserted has the direction of anything in the other network.
Weights are compared where both ends are known: sites are matched in network order, and what is matched
aligns the weights of the sites after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from deepenc.network.sites import Role, Site, Slot, broadcast
from deepenc.network.structure import State
from deepenc.network.surgery import narrow_sites

Pairs = tuple[Tensor, Tensor]
"""Indices in the one network and, in the same order, in the other; int64, on the CPU."""

WEIGHTS = (Role.INCOMING, Role.OUTGOING)
TRUSTED = 0.5  # pairs with less than this part of the site's median likeness align nothing


@dataclass(frozen=True, eq=False)
class Match:
    """How the channels of one site correspond to those of the other network's site.

    Attributes:
        partner: The other network's channel, -1 where none is left; ``(width,)``, int64.
        cosine: Likeness to the partner, in [-1, 1], 0 where there is none; ``(width,)``, float64.
        best: Likeness to the most alike channel, taken or not; ``(width,)``, float64.
    """

    partner: Tensor
    cosine: Tensor
    best: Tensor

    def strangeness(self) -> Tensor:
        """How little a channel is like its partner, ``(width,)``, float64: in [0, 2], or more without one."""
        alone = self.partner < 0
        return torch.where(alone, 3 - self.best, 1 - self.cosine)

    def pairs(self) -> Pairs:
        """The pairs that can be relied on."""
        matched = self.partner >= 0
        trusted = matched & (self.cosine > TRUSTED * self.cosine[matched].median())
        own = trusted.nonzero().flatten()
        return own, self.partner[own]


def match(
    tensors: State,
    sites: Sequence[Site],
    others: State,
    other_sites: Sequence[Site],
    *,
    rounds: int = 3,
) -> dict[str, Match]:
    """Match the channels of two networks of one architecture, site by site.

    Args:
        tensors: Tensors of the one network, by name.
        sites: Its sites, in network order.
        others: Tensors of the other network.
        other_sites: Its sites; those of equal names are matched.
        rounds: Passes over the network at most; it ends where nothing changes. In the first one, weights to
            later sites cannot be aligned yet.

    Returns:
        A match for each site that both networks have and that has weights to compare.
    """
    both = Aligned(tensors, sites, others, other_sites)
    for _ in range(rounds):
        before = dict(both.matches)
        left = [site for site in sites if site.name in both.twins]
        while left:
            waiting = [site for site in left if not both.match_site(site)]
            if len(waiting) == len(left):
                break
            left = waiting
        if before and all(torch.equal(before[n].partner, m.partner) for n, m in both.matches.items()):
            break
    return both.matches


class Aligned:
    """Two networks, and what is known so far of how their channels correspond.

    Attributes:
        twins: Site name to the other network's site.
        matches: Site name to the match found.
    """

    def __init__(
        self, tensors: State, sites: Sequence[Site], others: State, other_sites: Sequence[Site]
    ) -> None:
        self.tensors, self.others = tensors, others
        own = {site.name for site in sites}
        self.twins = {site.name: site for site in other_sites if site.name in own}
        self.matches: dict[str, Match] = {}
        self._along: dict[tuple[str, int], list[tuple[Site, Slot, Slot]]] = {}
        for site in sites:
            for slot, twin in self._slots(site):
                self._along.setdefault((slot.tensor, slot.dim), []).append((site, slot, twin))

    def _slots(self, site: Site) -> list[tuple[Slot, Slot]]:
        """Slots of a site with their counterparts in the other network, where there are such."""
        if site.name not in self.twins:
            return []
        pairs = zip(site.slots, self.twins[site.name].slots, strict=False)
        return [
            (a, b)
            for a, b in pairs
            if (a.tensor, a.dim, a.block) == (b.tensor, b.dim, b.block)
            and a.tensor in self.tensors
            and a.tensor in self.others
        ]

    def match_site(self, site: Site) -> bool:
        """Match one site by the weights that can be compared; False where there are none."""
        twin = self.twins[site.name]
        total, entries = torch.zeros(site.width, twin.width, dtype=torch.float64), 0
        for slot, other in self._slots(site):
            if slot.role in WEIGHTS and (held := self.comparable(site, slot, other)) is not None:
                count = held[0].shape[1]
                total += count * cosines(*held).double().cpu()
                entries += count
        if not entries:
            return False
        self.matches[site.name] = assign(total / entries)
        return True

    def comparable(self, site: Site, slot: Slot, other: Slot) -> tuple[Tensor, Tensor] | None:
        """A slot's weights in both networks, the columns aligned and on one scale; None if there are none.

        Returns:
            ``(width, features)`` and ``(width of the other, features)``.
        """
        one, two = _real(self.tensors[slot.tensor]), _real(self.others[slot.tensor])
        if one.dim() != two.dim():
            return None
        crossed = []
        for dim in range(one.dim()):
            if dim != slot.dim:
                pairs = self.entries(slot.tensor, dim, one.shape[dim], two.shape[dim])
                if pairs is None:
                    return None
                one = one.index_select(dim, pairs[0].to(one.device))
                two = two.index_select(dim, pairs[1].to(two.device))
                crossed += [dim] if (slot.tensor, dim) in self._along else []
        rows, other_rows = one, two
        if site.name in self.matches:  # rows that are no one's partner say nothing of the columns' scale
            own = self.entries(slot.tensor, slot.dim, one.shape[slot.dim], two.shape[slot.dim])
            if own is not None:
                rows = one.index_select(slot.dim, own[0].to(one.device))
                other_rows = two.index_select(slot.dim, own[1].to(two.device))
        for dim in crossed:
            one = one * rescaling(rows, other_rows, dim)
        width, height = site.width, self.twins[site.name].width
        return slot.rows(one, width), other.rows(two, height).to(one)

    def entries(self, tensor: str, dim: int, size: int, other_size: int) -> Pairs | None:
        """Which entries along a dimension correspond, as far as is known; None where nothing is."""
        free, other_free = np.ones(size, dtype=bool), np.ones(other_size, dtype=bool)
        own, others = [], []
        for site, slot, twin in self._along.get((tensor, dim), ()):
            free[slot.span(site.width)] = False
            other_free[twin.span(self.twins[site.name].width)] = False
            if site.name in self.matches:
                one, two = self.matches[site.name].pairs()
                own.append(slot.entries(one))
                others.append(twin.entries(two))
        if free.sum() == other_free.sum():
            own.append(torch.from_numpy(np.flatnonzero(free)))
            others.append(torch.from_numpy(np.flatnonzero(other_free)))
        if not sum(map(len, own)):
            return None
        return torch.cat(own), torch.cat(others)


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosine of each row with each other one, 1 for two zero rows; ``(n, f)``, ``(m, f)`` -> ``(n, m)``."""
    norms, other_norms = rows.norm(dim=1), others.norm(dim=1)
    tiny = torch.finfo(rows.dtype).tiny
    product = (rows / norms.clamp_min(tiny)[:, None]) @ (others / other_norms.clamp_min(tiny)[:, None]).T
    both_zero = (norms == 0)[:, None] & (other_norms == 0)[None, :]
    # Weights that are not finite are like nothing.
    return torch.where(both_zero, torch.ones_like(product), product.nan_to_num(0.0)).clamp(-1, 1)


def assign(likeness: Tensor) -> Match:
    """The one-to-one assignment of greatest total likeness (Hungarian method).

    Args:
        likeness: ``(width, width of the other)``, finite.
    """
    rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
    own, other = torch.from_numpy(rows), torch.from_numpy(columns)
    partner = torch.full((len(likeness),), -1, dtype=torch.int64)
    cosine = torch.zeros(len(likeness), dtype=torch.float64)
    partner[own], cosine[own] = other, likeness[own, other].double()
    return Match(partner, cosine, likeness.amax(dim=1).double())


def rescaling(rows: Tensor, others: Tensor, dim: int) -> Tensor:
    """Factors that bring the entries along a dimension to the size that they have in another tensor.

    A channel that was rescaled where it is made is scaled back where it is used. Medians, since some of
    the rows may be anything.

    Returns:
        Along ``dim``; broadcasts to the tensor's shape.
    """
    one, two = (t.movedim(dim, 0).flatten(1).abs().median(dim=1).values for t in (rows, others.to(rows)))
    factors = torch.where((one > 0) & (two > 0), two / one.clamp_min(torch.finfo(one.dtype).tiny), 1.0)
    return broadcast(factors, dim, rows.dim())


def _real(tensor: Tensor) -> Tensor:
    """Floats with precision enough to multiply."""
    return tensor.detach() if tensor.dtype in (torch.float32, torch.float64) else tensor.detach().float()


def sites_before(sites: Sequence[Site], tensors: State, others: State) -> tuple[Site, ...] | None:
    """The sites of the network before channels were inserted, from the sizes of its tensors.

    Args:
        sites: Sites of the encrypted network.
        tensors: Its tensors.
        others: Tensors of the network before.

    Returns:
        None where the sizes do not tell, or are not those of such a network.
    """
    counts: dict[str, int] = {}
    along: dict[tuple[str, int], list[tuple[Site, Slot]]] = {}
    for site in sites:
        for slot in site.slots:
            if slot.tensor in others and slot.tensor in tensors:
                along.setdefault((slot.tensor, slot.dim), []).append((site, slot))
    for _ in sites:  # each pass settles a site at least, or the last has nothing new
        before = len(counts)
        for (name, dim), meeting in along.items():
            unknown = {site.name for site, _ in meeting} - counts.keys()
            if len(unknown) == 1 and dim < others[name].dim():
                grown = tensors[name].shape[dim] - others[name].shape[dim]
                grown -= sum(counts[s.name] * slot.block for s, slot in meeting if s.name not in unknown)
                blocks = sum(slot.block for site, slot in meeting if site.name in unknown)
                counts[unknown.pop()], rest = divmod(grown, blocks)
                if rest:
                    return None
        if len(counts) == before:
            break
    if len(counts) < len(sites) or any(not 0 <= counts[s.name] < s.width for s in sites):
        return None
    return narrow_sites(sites, {name: tuple(range(count)) for name, count in counts.items()})
