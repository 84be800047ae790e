"""The two ways in which the paper fills confusion channels (Section 2.2), and parts to make others of.

The parts work on *rows*: the entries of channels in one slot, ``(channels, partners, unit)``. Partners are
the channels of the layer at the other end; what a channel has with one partner, its kernel, is a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons
from deepenc.network.sites import Role

NormSource = Literal["independent", "joint"]
"""Whether the vectors of a normalisation are drawn each by itself, or all from one real channel."""

NormFill = Literal["joint", "independent", "default"]
"""Where a confusion channel's bias and normalisation entries come from: all from one real channel, each from
one by itself, or the layer's defaults."""

_NORM = {Role.SCALE, Role.SHIFT, Role.MEAN, Role.VARIANCE}
DEFAULTS = {Role.BIAS: 0.0, Role.SCALE: 1.0, Role.SHIFT: 0.0, Role.MEAN: 0.0, Role.VARIANCE: 1.0}
"""What a layer starts with in its entries other than weights."""


def sample(
    neurons: Neurons, rng: np.random.Generator, norm_source: NormSource, channels: np.random.Generator
) -> list[Tensor]:
    """Draw every entry, with replacement, from the original entries of the same tensor.

    Args:
        neurons: What to fill.
        rng: Draws.
        norm_source: With ``"joint"``, the normalisation vectors of a neuron all come from one real channel.
        channels: Chooses those real channels.

    Returns:
        A tensor of ``gap.shape`` for each gap.
    """
    models = channels.integers(neurons.site.width, size=neurons.count) if norm_source == "joint" else None
    values = []
    for gap in neurons.gaps:
        if models is not None and gap.slot.role in _NORM and _is_vector(gap):
            index = gap.slot.entries(torch.from_numpy(models)).to(gap.victim.device)
            values.append(gap.victim.index_select(gap.slot.dim, index))
        else:
            pool = gap.victim.reshape(-1)
            kind = np.int32 if len(pool) < 2**31 else np.int64  # half the random bits, half the time
            index = torch.from_numpy(rng.integers(len(pool), size=prod(gap.shape), dtype=kind))
            values.append(pool.index_select(0, index.to(pool.device)).reshape(gap.shape))
    return values


def _is_vector(gap: Gap) -> bool:
    return gap.victim.numel() == gap.victim.shape[gap.slot.dim]


def initialise(neurons: Neurons, rng: np.random.Generator) -> list[Tensor]:
    """Draw weights by Kaiming initialisation (He et al. 2015), and set all else to the layer's defaults.

    Weights are normal with mean 0 and variance ``2 / fan_in``; scales and variances 1; biases, shifts
    and means 0.

    Args:
        neurons: What to fill.
        rng: The only source of randomness.

    Returns:
        A tensor of ``gap.shape`` for each gap.
    """
    values = []
    for gap in neurons.gaps:
        if gap.slot.role in DEFAULTS:
            values.append(gap.victim.new_full(gap.shape, DEFAULTS[gap.slot.role]))
        else:
            normal = rng.standard_normal(gap.shape, dtype=np.float32) * np.float32(sqrt(2 / fan_in(gap)))
            values.append(torch.from_numpy(normal).to(gap.victim))
    return values


def fan_in(gap: Gap) -> int:
    """Inputs of one output of the victim's layer, from the shape of its weights, ``(out, in, ...)`` or not.

    An incoming slot lies along the layer's outputs, an outgoing one along its inputs, whichever comes
    first in the tensor.
    """
    shape, dim = gap.victim.shape, gap.slot.dim
    if len(shape) < 2:
        return gap.victim.numel()
    outputs = dim if gap.slot.role is Role.INCOMING else 1 if dim == 0 else 0
    return gap.victim.numel() // shape[outputs]


class Floats:
    """The values of a victim's tensor, which made-up values should be like but not equal to.

    Attributes:
        common: Values that many entries have, such as the zeros of a pruned network: a confusion channel
            without them would stand out.
        rare: All others where such floats hardly repeat by accident; none in half precision, in large
            tensors, or among integers, where a channel of unique values would stand out.
    """

    def __init__(self, victim: Tensor) -> None:
        values, counts = torch.unique(victim.detach(), return_counts=True)
        common = (counts > 1) & (counts > 0.01 * victim.numel())
        self.common = values[common]
        accidents = int((counts[~common] - 1).sum())
        precise = victim.dtype in (torch.float32, torch.float64) and accidents <= 0.001 * victim.numel()
        self.rare = values[~common] if precise else values[:0]

    def jittered(self, rows: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
        """Multiply each entry by 1 + ``amount`` N, N standard normal; common values stay.

        Args:
            rows: Any shape.
            amount: Relative deviation, ``>= 0``.
            rng: The only source of randomness.

        Returns:
            Tensor of the same shape and of 32 bits or more; no entry changes its sign.
        """
        exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not amount:
            return exact
        normal = torch.from_numpy(rng.standard_normal(rows.shape, dtype=np.float32)).to(rows.device)
        factor = (1 + amount * normal).clamp_min(0.05)
        return torch.where(torch.isin(rows, self.common.to(rows.dtype)), exact, exact * factor)

    def apart(self, rows: Tensor) -> Tensor:
        """Move each entry that is one of the ``rare`` values, bit for bit, to the next float that is not."""
        clash = torch.isin(rows, self.rare.to(rows.dtype))
        while bool(clash.any()):
            rows = torch.where(clash, torch.nextafter(rows, rows.new_tensor(torch.inf)), rows)
            clash = torch.isin(rows, self.rare)
        return rows


def assemble(
    neurons: Neurons,
    rng: np.random.Generator,
    draw: Callable[[Gap, Tensor], Tensor],
    models: NDArray[np.int64],
    *,
    norm_source: NormFill = "joint",
    jitter: float = 0.0,
    weight_jitter: float | None = None,
    groups: NDArray[np.int64] | None = None,
) -> list[Tensor]:
    """Fill gaps: weights as ``draw`` says, all other entries from real channels; none of them equal floats.

    Args:
        neurons: What to fill.
        rng: The only source of randomness.
        draw: Makes the rows of confusion channels, ``(count, partners, unit)``, from a gap and the rows of
            the site's real channels in it, ``(width, partners, unit)``.
        models: Real channels whose entries the confusion channels take, ``(count,)``; ``(groups,)`` with
            ``groups``.
        norm_source: Where entries other than weights come from.
        jitter: See `Floats.jittered`; defaults of a layer have none.
        weight_jitter: The same for weights, where it is not ``jitter``.
        groups: Group of each confusion channel, ``(count,)``; entries other than weights are its group's.

    Returns:
        A tensor of ``gap.shape`` for each gap.
    """
    known: dict[str, Floats] = {}
    values = []
    for gap in neurons.gaps:
        if gap.slot.tensor not in known:
            known[gap.slot.tensor] = Floats(gap.victim)
        floats = known[gap.slot.tensor]
        real = real_rows(gap, neurons.site.width, rng)
        if gap.slot.role not in DEFAULTS:
            rows = floats.jittered(draw(gap, real), jitter if weight_jitter is None else weight_jitter, rng)
        elif norm_source == "default":
            rows = real.new_full((neurons.count, *real.shape[1:]), DEFAULTS[gap.slot.role])
            values.append(placed(rows, gap))
            continue
        else:
            own = models if norm_source == "joint" else rng.integers(len(real), size=len(models))
            rows = floats.jittered(picked(real, own if groups is None else own[groups]), jitter, rng)
        values.append(finished(rows, gap, floats))
    return values


def finished(rows: Tensor, gap: Gap, floats: Floats | None = None) -> Tensor:
    """Rows of confusion channels as the gap wants them, of the victim's dtype and without its rare values.

    Args:
        rows: ``(count, partners, block * kernel)``, of any dtype.
        gap: The gap.
        floats: Of the gap's victim; default: looked up.
    """
    return placed((floats or Floats(gap.victim)).apart(_typed(rows, gap.victim)), gap)


def real_rows(gap: Gap, width: int, rng: np.random.Generator) -> Tensor:
    """The rows of a site's real channels in a gap's slot, over the partners that confusion channels have.

    Where another site widens the tensor, confusion channels have more partners than real ones: what they have
    with a confusion channel of that site is made like what they have with a real one, drawn for it.

    Args:
        gap: The gap.
        width: Real channels of the site.
        rng: Draws those.

    Returns:
        ``(width, partners, block * kernel)``; of a vector one partner, and a unit of ``block``.
    """
    slot = gap.slot
    rows = slot.part(gap.victim.detach(), width)
    for dim, kept in gap.kept.items():
        if dim != slot.dim:
            index = rng.integers(len(kept), size=gap.shape[dim])
            index[kept.numpy()] = np.arange(len(kept))
            rows = rows.index_select(dim, torch.from_numpy(index).to(rows.device))
    rows = rows.movedim(slot.dim, 0)
    partners = rows.shape[1] if rows.ndim > 1 else 1
    rows = rows.reshape(width, slot.block, partners, -1)
    return rows.transpose(1, 2).reshape(width, partners, -1)


def placed(rows: Tensor, gap: Gap) -> Tensor:
    """Rows of confusion channels, ``(count, partners, block * kernel)``, as the gap wants them."""
    others = [size for dim, size in enumerate(gap.shape) if dim != gap.slot.dim]
    blocks = rows.reshape(*rows.shape[:2], gap.slot.block, -1).transpose(1, 2)
    return blocks.reshape(-1, *others).movedim(0, gap.slot.dim).contiguous()


def _typed(rows: Tensor, victim: Tensor) -> Tensor:
    """Rows in the victim's dtype; a negative zero, which no other entry may be, becomes zero."""
    if victim.dtype.is_floating_point:
        range_of = torch.finfo(victim.dtype)
        return rows.clamp(range_of.min, range_of.max).to(victim.dtype) + 0
    return rows.round().clamp(victim.min(), victim.max()).to(victim.dtype)


def picked(rows: Tensor, channels: NDArray[np.int64]) -> Tensor:
    """The rows of some channels, ``(len(channels), partners, unit)``."""
    return rows.index_select(0, torch.from_numpy(channels).to(rows.device))


def bootstrapped(rows: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """New rows, each unit one that a real channel, drawn for it, has with the same partner.

    Args:
        rows: ``(width, partners, unit)``.
        count: Rows to make.
        rng: The only source of randomness.

    Returns:
        ``(count, partners, unit)``.
    """
    channels = rng.integers(rows.shape[0], size=(count, rows.shape[1]))
    return rows[torch.from_numpy(channels).to(rows.device), torch.arange(rows.shape[1], device=rows.device)]


def distinct(width: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Channels drawn at random, ``(count,)``; none a second time before all were drawn."""
    rounds = [rng.permutation(width) for _ in range(-(-count // width))]
    return np.concatenate(rounds)[:count]
