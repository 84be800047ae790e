"""What detectors of confusion channels measure, and target statistics for each confusion channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from deepenc.analysis.features import formulas
from deepenc.encryption.filling.entries import Limits
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.surgery import Layout

TINY = 1e-12
QUANTILES = 8
"""Of the entries of a row, at equal distances."""


@dataclass(frozen=True)
class Statistic:
    """One number for each channel of a site.

    Attributes:
        slot: What it is read from.
        kind: ``size`` is the logarithm of a row's norm or, in a vector, the entry itself.
        values: ``(width,)``.
    """

    slot: Slot
    kind: Literal["size", "shape"]
    values: Tensor


def penalty(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """How far confusion channels stand out: mean over statistics of the excess of their z-scores.

    A z-score is taken against the real channels of the same site; its first unit is free, so that nothing
    pulls confusion channels to the very middle, where they would stand out by being too typical.

    Args:
        tensors: The encrypted network's, by name, whole: parameters, and what BatchNorm sees of a batch
            (`deepenc.analysis.batchnorm.batch_moments`); those not given are not looked at.
        layout: Where the victim's entries lie in them.

    Returns:
        A scalar ``>= 0``.
    """
    found = []
    for site, inserted, real in _sites(layout):
        table = _table(tensors, site)
        z = _z(table[inserted], table[real].mean(0), table[real])
        found.append(_huber((z.abs() - 1).clamp_min(0)))
    return _mean(found, tensors)


class Disguise:
    """A look for each confusion channel, drawn from the joint distribution of the real channels' statistics.

    The joint distribution of a site is a Gaussian copula: each statistic is distributed as it is among the
    real channels, and any two are correlated as they are there. No confusion channel copies a real one,
    which would be found by its likeness to it, and none is more typical than real ones are.

    Args:
        tensors: As for `penalty`.
        layout: Where the victim's entries lie in them.
        rng: Draws.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: Layout, rng: np.random.Generator) -> None:
        self._layout = layout
        self._ranks: dict[str, Tensor] = {}
        for site, inserted, real in _sites(layout):
            known = _table(tensors, site)[real].detach().cpu().numpy()
            scores = norm.ppf((rankdata(known, axis=0) - 0.5) / len(known))
            scores /= np.maximum(scores.std(0), TINY)
            drawn = rng.normal(size=(len(inserted), len(known))) @ scores / len(known) ** 0.5
            self._ranks[site.name] = torch.from_numpy(norm.cdf(drawn))

    def target_norms(self, tensors: Mapping[str, Tensor]) -> Limits:
        """How large each confusion channel shall be in each slot; the least and the largest are equal."""
        result, victims = {}, {site.name: site for site in self._layout.sites}
        for site, _, real in _sites(self._layout):
            slots = dict(zip(site.slots, victims[site.name].slots, strict=True))
            wanted = self._wanted(_table(tensors, site)[real], site).detach()
            for size, statistic in zip(wanted.T, _statistics(tensors, site), strict=True):
                slot = statistic.slot
                if statistic.kind == "size":
                    vector = tensors[slot.tensor].ndim == 1
                    each = size.repeat_interleave(slot.block) if vector else size.exp()
                    result[site.name, slots[slot]] = (each, each)
        return result

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """How far the confusion channels are from their looks, counted as by `penalty`; nothing is free."""
        found = []
        for site, inserted, real in _sites(self._layout):
            table = _table(tensors, site)
            found.append(_huber(_z(table[inserted], self._wanted(table[real], site), table[real])))
        return _mean(found, tensors)

    def _wanted(self, real: Tensor, site: Site) -> Tensor:
        """The looks, ``(confusion channels, statistics)``: quantiles of what the real channels have now."""
        ranks = self._ranks[site.name].to(real)
        ordered = real.detach().sort(0).values
        place = ranks * (len(ordered) - 1)
        below = place.floor().long().clamp_max(len(ordered) - 2)
        low, high = ordered.gather(0, below), ordered.gather(0, below + 1)
        return low + (place - below) * (high - low)


def _sites(layout: Layout) -> Iterator[tuple[Site, list[int], list[int]]]:
    """Widened sites with confusion channels, and more than one real one: the site, those, and these."""
    for site in layout.widened_sites():
        inserted = list(layout.positions[site.name])
        real = sorted(set(range(site.width)) - set(inserted))
        if inserted and len(real) > 1:
            yield site, inserted, real


def _z(values: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    return (values - wanted.detach()) / real.std(0).detach().clamp_min(1e-6)


def _huber(excess: Tensor) -> Tensor:
    """Mean over channels of the square up to 1 and the excess itself beyond (Huber 1964)."""
    return smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none").mean(0)


def _mean(found: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(found)).mean() if found else next(iter(tensors.values())).new_zeros(())


def _table(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    return torch.stack([statistic.values for statistic in _statistics(tensors, site)], dim=1)


def _statistics(tensors: Mapping[str, Tensor], site: Site) -> Iterator[Statistic]:
    """Statistics of a site's channels.

    For each slot of weights those that `deepenc.analysis.features` has of a side, as far as they are
    differentiable, and quantiles of the entries, which stand for the distances of distributions. Of vectors
    (biases, a normalisation's factors, what BatchNorm sees) the entries, of variances their logarithms.
    """
    for slot in site.slots:
        tensor = tensors.get(slot.tensor)
        if tensor is None or not tensor.is_floating_point():
            continue
        rows = slot.rows(tensor, site.width)
        if slot.role in (Role.MEAN, Role.VARIANCE):
            entries = rows.clamp_min(TINY).log() if slot.role is Role.VARIANCE else rows
            yield Statistic(slot, "shape", entries.mean(1))
        elif tensor.ndim == 1:
            yield Statistic(slot, "size", rows.mean(1))
        else:
            square = rows.square().sum(1)
            yield Statistic(slot, "size", formulas.log_norm(square.clamp_min(TINY)))
            for values in _shapes(rows, square, tuple(tensor.shape[2:]) if slot.dim < 2 else ()):
                yield Statistic(slot, "shape", values.to(rows))


def _shapes(rows: Tensor, square: Tensor, kernel: tuple[int, ...]) -> Iterator[Tensor]:
    """Statistics of rows, ``(width, entries)``, that are of kernels of that size."""
    yield from formulas.moments(rows)
    unit = rows / square.clamp_min(TINY).sqrt()[:, None]
    places = (torch.arange(QUANTILES, device=rows.device, dtype=rows.dtype) + 0.5) / QUANTILES
    yield from (unit * rows.shape[1] ** 0.5).quantile(places, dim=1)
    cosines = unit @ unit.T
    yield formulas.subspace(unit, cosines)
    yield formulas.nearest(cosines)
    kernels = rows.view(len(rows), -1, *kernel)
    energies = kernels.flatten(2).square().mean(2) if kernel else rows.square()
    yield formulas.profile(energies / energies.mean(1, keepdim=True).clamp_min(TINY))
    if dims := [2 + dim for dim, size in enumerate(kernel) if size > 1]:
        yield formulas.roughness(kernels, dims)
