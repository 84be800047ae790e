"""The weights of a site's channels, one row a channel, whatever the layers they lie in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deepenc.errors import SiteError
from deepenc.network.sites import Role, Site, Slot


def slot_rows(tensor: Tensor, slot: Slot, width: int) -> Tensor:
    """The entries of one slot, one row a channel.

    Args:
        tensor: The tensor that the slot is in; any tensor of its shape will do.
        slot: Where the channels lie.
        width: Channels of the slot's site.

    Returns:
        ``(width, features)``; a view where possible.

    Raises:
        SiteError: The slot reaches outside the tensor.
    """
    length = width * slot.block
    if slot.dim >= tensor.ndim or slot.start + length > tensor.shape[slot.dim]:
        raise SiteError(
            f"slot [{slot.start}, {slot.start + length}) of dimension {slot.dim} does not fit tensor "
            f"{slot.tensor!r} of shape {tuple(tensor.shape)}; is the site list of another network?"
        )
    return tensor.narrow(slot.dim, slot.start, length).movedim(slot.dim, 0).reshape(width, -1)


def role_rows(state: Mapping[str, Tensor], site: Site, role: Role) -> Iterator[tuple[Slot, Tensor]]:
    """Each slot of a role with its rows, ``(width, features)``, in the order of the site's slots."""
    for slot in site.slots:
        if slot.role is role:
            yield slot, slot_rows(state[slot.tensor], slot, site.width)


def channel_rows(state: Mapping[str, Tensor], site: Site, role: Role) -> Tensor:
    """All weights that a site's channels have in one role.

    Args:
        state: State dict of the network.
        site: The site, with the widths of that network.
        role: Which weights, e.g. ``Role.INCOMING``.

    Returns:
        ``(width, features)``; without features where no slot has the role.

    Raises:
        SiteError: A slot reaches outside its tensor.
    """
    rows = [values for _, values in role_rows(state, site, role)]
    return torch.cat(rows, dim=1) if rows else torch.empty(site.width, 0)
