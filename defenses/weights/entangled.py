"""Weights: groups of neurons that do little harm together and much harm apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import NormFill, assemble, bootstrapped, distinct
from deepenc.network.sites import Role


class Entangled(Weights):
    """Groups whose large contributions nearly cancel, while removing some of a group does great harm.

    An all-or-nothing transform for neurons, against partial keys and ablation one at a time. The neurons of
    a group have the same incoming weights, bias and norms up to noise, thus the same activation; their large
    outgoing weights add up to a small remainder, the damage that a whole group does. At contracted sites
    (queries with keys) only what flows through outgoing weights cancels.

    A site's neurons are divided into groups of ``group`` or more; a site with fewer makes one group, and
    one neuron alone is an ordinary one with incoming and outgoing weights like `conditional`'s.

    What tells: a group is a set of near copies, in weights and in activations, whose outgoing weights are
    large and lie against each other.
    """

    name: ClassVar[str] = "entangled"
    per_tensor: ClassVar[bool] = True

    group: int = Field(2, ge=2)
    """Neurons in a group."""
    strength: float = Field(3.0, gt=0, le=100, allow_inf_nan=False)
    """Norm of a neuron's outgoing weights in a layer, relative to the median of the real ones."""
    remainder: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    """Norm of a group's summed outgoing weights, likewise."""
    jitter: float = Field(0.02, ge=0, le=0.5)
    """Relative deviation of each entry within a group; what it makes of activations does not cancel."""
    norm_source: NormFill = "joint"
    """Whether a group's bias and normalisation entries come from one real channel, from several, or are
    defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        groups = grouped(neurons.count, self.group, channels)
        number = int(groups.max()) + 1
        models = distinct(neurons.site.width, number, channels)
        member = torch.from_numpy(groups)

        def draw(gap: Gap, real: Tensor) -> Tensor:
            shared = bootstrapped(real, number, rng)
            if gap.slot.role is Role.INCOMING:
                return shared[member.to(real.device)]
            return self._opposed(real, shared, member.to(real.device), rng)

        return assemble(
            neurons,
            rng,
            draw,
            models,
            norm_source=self.norm_source,
            jitter=self.jitter,
            groups=groups,
        )

    def _opposed(self, real: Tensor, shared: Tensor, member: Tensor, rng: np.random.Generator) -> Tensor:
        """Rows of ``strength`` that add up to one of ``remainder`` in each group."""
        kind = torch.promote_types(real.dtype, torch.float32)
        typical = real.to(kind).flatten(1).norm(dim=1).median()
        size = torch.bincount(member).to(kind).view(-1, 1, 1)
        rows = bootstrapped(real, len(member), rng).to(kind)
        rows = rows - _summed(rows, member, len(size))[member] / size[member]
        # One factor for a whole group, or its rows would no longer add up to nothing.
        power = _summed(rows.square().sum((1, 2), keepdim=True), member, len(size)) / size
        # Below a thousandth of a row there is nothing but rounding left of equal rows.
        least = max(1e-3 * float(typical), 1e-30)
        rows = rows * (self.strength * typical / power.sqrt().clamp_min(least))[member]
        rest = shared.to(kind)
        length = rest.flatten(1).norm(dim=1).clamp_min(least).view(-1, 1, 1)
        opposed: Tensor = rows + (self.remainder * typical * rest / length / size)[member]
        return opposed


def grouped(count: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Divide neurons at random into groups of ``size`` or more; the group of each, ``(count,)``."""
    groups = np.empty(count, dtype=np.int64)
    for number, members in enumerate(np.array_split(rng.permutation(count), max(1, count // size))):
        groups[members] = number
    return groups


def _summed(rows: Tensor, member: Tensor, groups: int) -> Tensor:
    """Sum of the rows of each group, ``(groups, ...)``."""
    return rows.new_zeros((groups, *rows.shape[1:])).index_add(0, member, rows)
