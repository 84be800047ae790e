"""Hardening: one release of one model, which moves as the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.encryption.defense import Hardening, Original
from deepenc.network.sites import Role, Slot
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout

FACTORS = frozenset({Role.SCALE, Role.VARIANCE})
"""Roles whose entries move by a factor; other vectors move by a difference."""
MOST = 2.0
"""Largest factor, and its inverse the smallest."""
TINY = 1e-12


class Drift(Hardening):
    """After authorised fine-tuning, move the confusion channels as the victim's own have moved.

    The paper draws them again, so that whoever has both releases sees which channels changed altogether. Here
    positions stay, and each confusion channel takes the step of a real one drawn at random: in each tensor
    as far in proportion to its norm, and turned by as much. An unchanged model gives the same release again.
    On the first release it does nothing. `encrypt` and `reshelter(previous=...)` with it, never again from
    scratch: two independent encryptions give the key away whatever follows.
    """

    name: ClassVar[str] = "drift"
    follows: ClassVar[bool] = True

    def follow(
        self,
        network: nn.Module,
        layout: Layout,
        before: Mapping[str, Tensor],
        original: Original,
        rng: np.random.Generator,
    ) -> None:
        """See `Hardening.follow`."""
        now = named_tensors(network)
        for site, wide in zip(layout.sites, layout.widened_sites(), strict=True):
            inserted = list(layout.positions[site.name])
            if not inserted:
                continue
            real = np.setdiff1d(np.arange(wide.width), inserted)
            donors = rng.choice(real, size=len(inserted))
            with torch.no_grad():
                for slot in wide.slots:
                    if now[slot.tensor].is_floating_point():
                        _move(now[slot.tensor], before[slot.tensor], slot, inserted, donors.tolist())


def _move(now: Tensor, before: Tensor, slot: Slot, inserted: list[int], donors: list[int]) -> None:
    """Move some channels in one slot, in place, each by the step of its donor."""

    def rows(tensor: Tensor, channels: list[int]) -> Tensor:
        return tensor.detach().index_select(slot.dim, slot.entries(channels).to(tensor.device))

    own, (old, new) = rows(before, inserted), (rows(before, donors), rows(now, donors))
    if now.ndim > 1:
        shape = own.movedim(slot.dim, 0).shape
        flat = [x.double().movedim(slot.dim, 0).reshape(len(inserted), -1) for x in (own, old, new)]
        moved = _turned(*flat).reshape(shape).movedim(0, slot.dim)
    elif slot.role in FACTORS:
        factor = torch.where(old.abs() > TINY, new.double() / old.double(), 1.0)
        moved = own * factor.clamp(1 / MOST, MOST)
    else:
        moved = own.double() + (new.double() - old.double())
    now.index_copy_(slot.dim, slot.entries(inserted).to(now.device), moved.to(now.dtype))


def _turned(own: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Rows moved as far in proportion to their norms, and turned by as much, as others were from old to new.

    Of the others' step the part along the old row becomes a factor; the part across it is made perpendicular
    to the row that moves, and keeps its length in proportion.
    """
    length = old.square().sum(1, keepdim=True).clamp_min(TINY)
    along = ((new - old) * old).sum(1, keepdim=True) / length
    across = new - old - along * old
    size = across.norm(dim=1, keepdim=True)
    mine = own.square().sum(1, keepdim=True).clamp_min(TINY)
    across = across - (across * own).sum(1, keepdim=True) / mine * own
    across = across * (size / across.norm(dim=1, keepdim=True).clamp_min(TINY))
    turned: Tensor = own * (1 + along) + across * (mine / length).sqrt()
    return turned
