"""What a detector of confusion channels looks at, differentiable: statistics of each channel's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from deepenc.network.channels import slot_rows
from deepenc.network.sites import Role, Site
from deepenc.network.surgery import Layout

TINY = 1e-12


def penalty(tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """How far confusion channels stand out: mean over statistics of the excess of their z-scores.

    A z-score is taken against the real channels of the same site; its first unit is free, so that nothing
    pulls confusion channels to the very middle, where they would stand out by being too typical. Of the
    excess the square counts up to 1, and the excess itself beyond (Huber 1964).

    Args:
        tensors: The encrypted network's, by name, whole.
        layout: Where the victim's entries lie in them.

    Returns:
        A scalar ``>= 0``.
    """
    found = []
    for site in layout.widened_sites():
        forged = list(layout.positions[site.name])
        real = sorted(set(range(site.width)) - set(forged))
        if forged and len(real) > 1:
            table = statistics(tensors, site)
            mean, deviation = table[real].mean(0).detach(), table[real].std(0).detach()
            z = (table[forged] - mean) / deviation.clamp_min(1e-6)
            excess = (z.abs() - 1).clamp_min(0)
            found.append(smooth_l1_loss(excess, torch.zeros_like(excess), reduction="none").mean(0))
    if not found:
        return next(iter(tensors.values())).new_zeros(())
    return torch.cat(found).mean()


def statistics(tensors: Mapping[str, Tensor], site: Site) -> Tensor:
    """A table of statistics of a site's channels, ``(width, statistics)``.

    For each slot of weights: the logarithm of the norm; the roughness of kernels; the kurtosis; the likeness
    of its energies over the other layer's channels to the site's own profile; the largest likeness to
    another channel. Of vectors (biases, a normalisation's factors) the entries.
    """
    columns: list[Tensor] = []
    for slot in site.slots:
        tensor = tensors.get(slot.tensor)
        if tensor is None or not tensor.is_floating_point() or slot.role in (Role.MEAN, Role.VARIANCE):
            continue
        rows = slot_rows(tensor, slot, site.width)
        if tensor.ndim == 1:
            columns.append(rows.mean(1))
            continue
        columns += [_log_norm(rows), _kurtosis(rows), _likeness(rows)]
        if tensor.ndim == 4 and tensor.shape[2] * tensor.shape[3] > 1 and slot.dim < 2:
            kernels = rows.view(site.width, -1, tensor.shape[2], tensor.shape[3])
            columns += [_roughness(kernels), _profile(kernels.flatten(2))]
    return torch.stack(columns, dim=1)


def _log_norm(rows: Tensor) -> Tensor:
    return rows.square().sum(1).clamp_min(TINY).log() / 2


def _kurtosis(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    fourth, second = centred.square().square().mean(1), centred.square().mean(1)
    return fourth.clamp_min(TINY).log() - 2 * second.clamp_min(TINY).log()


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


def _profile(kernels: Tensor) -> Tensor:
    """Correlation of each channel's energies over the other layer's channels with their mean profile."""
    energy = kernels.square().sum(2).clamp_min(TINY).log()
    mean = energy.median(0).values.detach()
    a, b = energy - energy.mean(1, keepdim=True), mean - mean.mean()
    return torch.cosine_similarity(a, b[None], dim=1, eps=TINY)
