"""What a detector of confusion channels looks at, differentiable, and a look for each of them to take on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

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
    for site, forged, real in _sites(layout):
        table = _table(tensors, site, real)
        z = _z(table[forged], table[real].mean(0), table[real])
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
        for site, forged, real in _sites(layout):
            known = _table(tensors, site, real)[real].detach().cpu().numpy()
            scores = norm.ppf((rankdata(known, axis=0) - 0.5) / len(known))
            scores /= np.maximum(scores.std(0), TINY)
            drawn = rng.normal(size=(len(forged), len(known))) @ scores / len(known) ** 0.5
            self._ranks[site.name] = torch.from_numpy(norm.cdf(drawn))

    def sizes(self, tensors: Mapping[str, Tensor]) -> Limits:
        """How large each confusion channel shall be in each slot; the least and the largest are equal."""
        result, victims = {}, {site.name: site for site in self._layout.sites}
        for site, _, real in _sites(self._layout):
            slots = dict(zip(site.slots, victims[site.name].slots, strict=True))
            wanted = self._wanted(_table(tensors, site, real)[real], site).detach()
            for size, statistic in zip(wanted.T, _statistics(tensors, site, real), strict=True):
                slot = statistic.slot
                if statistic.kind == "size":
                    vector = tensors[slot.tensor].ndim == 1
                    each = size.repeat_interleave(slot.block) if vector else size.exp()
                    result[site.name, slots[slot]] = (each, each)
        return result

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """How far the confusion channels are from their looks, counted as by `penalty`; nothing is free."""
        found = []
        for site, forged, real in _sites(self._layout):
            table = _table(tensors, site, real)
            found.append(_huber(_z(table[forged], self._wanted(table[real], site), table[real])))
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
        forged = list(layout.positions[site.name])
        real = sorted(set(range(site.width)) - set(forged))
        if forged and len(real) > 1:
            yield site, forged, real


def _z(values: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
    return (values - wanted.detach()) / real.std(0).detach().clamp_min(1e-6)


def _huber(excess: Tensor) -> Tensor:
    """Mean over channels of the square up to 1 and the excess itself beyond (Huber 1964)."""
    return smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none").mean(0)


def _mean(found: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(found)).mean() if found else next(iter(tensors.values())).new_zeros(())


def _table(tensors: Mapping[str, Tensor], site: Site, real: Sequence[int]) -> Tensor:
    return torch.stack([statistic.values for statistic in _statistics(tensors, site, real)], dim=1)


def _statistics(tensors: Mapping[str, Tensor], site: Site, real: Sequence[int]) -> Iterator[Statistic]:
    """Statistics of a site's channels.

    For each slot of weights: the logarithm of the norm; the distribution of the entries, by its mean, skew,
    kurtosis and quantiles; the share of the energy in the leading subspace of the real channels; the largest
    likeness to another channel; how well the energies over the other layer's channels fit the site's own
    profile; the roughness of kernels. Of vectors (biases, a normalisation's factors, what BatchNorm sees) the
    entries, of variances their logarithms.
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
            yield Statistic(slot, "size", rows.square().sum(1).clamp_min(TINY).log() / 2)
            kernel = tensor.shape[2:] if slot.dim < 2 else ()
            energies = rows.view(site.width, -1, prod(kernel)).square().mean(2)
            shapes = [*_distribution(rows), _share(rows, real), _likeness(rows), _profile(energies)]
            if len(kernel) == 2 and prod(kernel) > 1:
                shapes.append(_roughness(rows.view(site.width, -1, *kernel)))
            yield from (Statistic(slot, "shape", values) for values in shapes)


def _distribution(rows: Tensor) -> list[Tensor]:
    """Mean, skew, log kurtosis and quantiles of the entries of each row, in units of their size."""
    scaled = rows / rows.square().mean(1, keepdim=True).clamp_min(TINY).sqrt()
    mean = scaled.mean(1)
    centred = scaled - mean[:, None]
    second = centred.square().mean(1).clamp_min(TINY)
    skew = (centred**3).mean(1) / second**1.5
    kurtosis = centred.square().square().mean(1).clamp_min(TINY).log() - 2 * second.log()
    places = (torch.arange(QUANTILES, device=rows.device, dtype=rows.dtype) + 0.5) / QUANTILES
    return [mean, skew, kurtosis, *scaled.quantile(places, dim=1)]


def _share(rows: Tensor, real: Sequence[int]) -> Tensor:
    """Share of each row's energy in the soft leading subspace of the real rows other than itself.

    As `deepenc.analysis.features` has it (``subspace``).
    """
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)
    known = unit[list(real)].detach()
    ridge = len(known) / min(known.shape)
    gram = known @ known.T
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), device=gram.device, dtype=gram.dtype))
    near = unit @ known.T
    share = ((near @ inverse) * near).sum(1)
    leverage = 1 - ridge * inverse.diagonal()
    without_itself = 1 - ridge * leverage / (1 - leverage).clamp_min(TINY)
    result: Tensor = share.index_put((torch.tensor(real, device=rows.device),), without_itself)
    return result


def _likeness(rows: Tensor) -> Tensor:
    """The largest cosine to another channel."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(TINY)
    cosine: Tensor = (unit @ unit.T).fill_diagonal_(-1)
    return cosine.amax(1)


def _roughness(kernels: Tensor) -> Tensor:
    """Energy of the differences between neighbours in kernels ``(width, others, height, width)``."""
    steps = [kernels.diff(dim=dim).square().sum((1, 2, 3)) for dim in (2, 3)]
    energy = kernels.square().sum((1, 2, 3)).clamp_min(TINY)
    return (sum(steps[1:], steps[0]).clamp_min(TINY) / energy).log()


def _profile(energies: Tensor) -> Tensor:
    """How well the other channels' energies over the other layer's, ``(width, others)``, fit each row's.

    As `deepenc.analysis.features` has it (``profile``).
    """
    own = energies / energies.mean(1, keepdim=True).clamp_min(TINY)
    others = (own.sum(0) - own) / (len(own) - 1) + 1e-6
    ratio: Tensor = -((own / others).mean(1).clamp_min(TINY).log() + others.log().mean(1)) / 2
    return ratio
