"""The weights of a site as its statistics read them: slot by slot, one row a channel, scaled alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deepenc.analysis.features.formulas import moments
from deepenc.analysis.features.ranks import Distances, distances
from deepenc.errors import SiteError
from deepenc.network.sites import Role, Site, Slot

ENTRIES = 2**23
"""Entries of a slot that are looked at; of a larger one as many partners, evenly spaced (not for norms)."""
CHUNK = 2**20
"""Entries whose norms are taken at once."""
KERNEL = 31
"""Largest kernel in use; a dimension beyond it is no kernel's."""
NEGLIGIBLE = 0.05
"""Norm, relative to the site's median, below which on both sides a channel is dead. What weight decay leaves
of one has 0.01 to 0.03 of the median in public CIFAR-10 ResNets; the least of the others has 0.5."""


class Part:
    """One slot.

    Args:
        tensor: The tensor that the slot is in.
        slot: Where the channels lie.
        width: Channels of the site.

    Attributes:
        shaped: Channels whose row has a shape: not zero, nor the leftovers of a dead channel; ``(width,)``.
    """

    def __init__(self, tensor: Tensor, slot: Slot, width: int) -> None:
        self._tensor, self._slot, self.width = tensor.detach(), slot, width
        self.shaped = self.square > 0

    @cached_property
    def values(self) -> Tensor:
        """``(width, partners, block, *kernel)`` float32 on the CPU, of root mean square 1.

        A partner is an index of the tensor's other channel dimension: what a weight comes from or goes to.
        """
        tensor, slot = self._tensor, self._slot
        if slot.dim > 1 or tensor.ndim < 2:  # not a layer's weights as we know them: all others are partners
            rows = slot.rows(tensor, self.width)
            tensor, slot = rows.reshape(self.width * slot.block, -1), Slot("", 0, slot.role, 0, slot.block)
        other = 1 - slot.dim
        partners = tensor.shape[other]
        each = max(1, self.width * slot.block * tensor.shape[2:].numel())
        if partners * each > ENTRIES:
            kept = max(1, ENTRIES // each)
            chosen = torch.arange(kept, device=tensor.device) * partners // kept
            tensor, partners = tensor.index_select(other, chosen), kept
        rows = slot.rows(tensor, self.width).to("cpu", torch.float32)
        values = rows.reshape(self.width, slot.block, partners, *tensor.shape[2:]).movedim(1, 2).contiguous()
        scale = _norm(values) / max(1, values.numel()) ** 0.5
        if not torch.isfinite(scale):  # a broken network; what is left of it
            values = values.nan_to_num(0, 0, 0)
            scale = _norm(values) / max(1, values.numel()) ** 0.5
        return values / torch.where(scale > 0, scale, 1).float()

    @cached_property
    def rows(self) -> Tensor:
        """``(width, entries)``: `values`, flat."""
        return self.values.flatten(1)

    @property
    def entries(self) -> int:
        """Entries of a row that are looked at."""
        return self.rows.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel; none for a layer without."""
        sizes = tuple(self._tensor.shape[2:]) if self._slot.dim <= 1 else ()
        return sizes if all(size <= KERNEL for size in sizes) else ()

    @cached_property
    def square(self) -> Tensor:
        """Sum of squares of each row of the tensor as it is, ``(width,)`` float64."""
        slot = self._slot
        entries = slot.part(self._tensor, self.width).movedim(slot.dim, 0)
        others = tuple(range(1, entries.ndim))
        few = max(1, CHUNK // max(1, entries[0].numel()))  # at once: in double precision they are a copy
        norms = [_norm(some, others) if others else some.double().abs() for some in torch.split(entries, few)]
        return torch.cat(norms).square().reshape(self.width, -1).sum(dim=1).nan_to_num(0, 0, 0).cpu()

    @cached_property
    def energies(self) -> Tensor:
        """Mean square of every channel at every partner, ``(width, partners)`` float64."""
        return self.values.flatten(2).square().mean(dim=2, dtype=torch.float64)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean, deviation, skew and excess kurtosis of each row, ``(width,)`` each; NaN where undefined."""
        mean, deviation, skew, kurtosis = moments(self.rows)
        flat = ~self.shaped | (deviation <= 1e-6 * mean.abs())
        skew, kurtosis = (shape.masked_fill(flat, torch.nan) for shape in (skew, kurtosis))
        return mean, deviation.masked_fill(flat, 0), skew, kurtosis

    @cached_property
    def distances(self) -> Distances:
        """How far the distribution of each row is from that of the whole slot."""
        return distances(self.rows.numpy())


def _norm(entries: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(entries, dim=dims, dtype=torch.float64)
    return norms


@dataclass(eq=False)
class Side:
    """All slots of a site in one role, incoming or outgoing."""

    parts: list[Part]

    @property
    def width(self) -> int:
        """Channels of the site."""
        return self.parts[0].width

    def mean(self, statistic: Callable[[Part], Tensor | None]) -> Tensor | None:
        """A statistic of the slots, averaged over those that have it, each by its entries.

        Returns:
            ``(width,)``, or None where no slot has it.
        """
        found = [(part.entries, values) for part in self.parts if (values := statistic(part)) is not None]
        if not found:
            return None
        total = sum(entries for entries, _ in found)
        return torch.stack([values * (entries / total) for entries, values in found]).sum(dim=0)

    @cached_property
    def square(self) -> Tensor:
        """Sum of squares of all weights of each channel, ``(width,)`` float64."""
        return torch.stack([part.square for part in self.parts]).sum(dim=0)

    @cached_property
    def directions(self) -> Tensor:
        """The rows of all slots side by side, ``(width, entries)`` float32, of norm 1; 0 without a shape."""
        rows = torch.cat([part.rows * part.shaped[:, None] for part in self.parts], dim=1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(norms > 0, norms, 1)

    @cached_property
    def cosines(self) -> Tensor:
        """Cosine of every row with every other, ``(width, width)`` float32."""
        return self.directions @ self.directions.T


class SiteChannels:
    """What the statistics of a site read.

    Args:
        tensors: State dict of the network, or `deepenc.network.structure.named_tensors`.
        site: The site.

    Attributes:
        incoming: Weights that make the channels; None where there are none.
        outgoing: Weights that carry them on; None where there are none.
        alive: Whether the weights on either side are more than `NEGLIGIBLE`, ``(width,)``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], site: Site) -> None:
        self._tensors, self._site = tensors, site
        self.incoming = self._side(Role.INCOMING)
        self.outgoing = self._side(Role.OUTGOING)
        sides = [side for side in (self.incoming, self.outgoing) if side is not None]
        self.alive = torch.full((site.width,), not sides)
        for side in sides:
            self.alive |= side.square > NEGLIGIBLE**2 * side.square.median()
        for part in (part for side in sides for part in side.parts):
            part.shaped &= self.alive

    def _slots(self, role: Role) -> list[tuple[Slot, Tensor]]:
        found = []
        for slot in self._site.slots:
            if slot.role is role:
                if slot.tensor in self._tensors:
                    found.append((slot, self._tensors[slot.tensor]))
                elif slot.persistent:
                    raise SiteError(
                        f"site {self._site.name!r} has channels in {slot.tensor!r}, which is not among the "
                        f"{len(self._tensors)} tensors given; is the site list of another network?"
                    )
        return found

    def _side(self, role: Role) -> Side | None:
        parts = [Part(tensor, slot, self._site.width) for slot, tensor in self._slots(role) if tensor.numel()]
        return Side(parts) if parts else None

    def role(self, role: Role) -> Tensor | None:
        """The entries of the site's vectors of one role, averaged over the slots; ``(width,)`` or None."""
        width = self._site.width
        rows = [slot.rows(tensor, width).detach().double().cpu() for slot, tensor in self._slots(role)]
        return torch.stack([row.mean(dim=1) for row in rows]).mean(dim=0).nan_to_num() if rows else None
