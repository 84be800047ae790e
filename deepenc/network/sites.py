"""What can be widened: sites and their slots, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from deepenc.errors import SiteError


class Role(StrEnum):
    """What a slot's entries are to the channel they belong to."""

    INCOMING = "incoming"  # weights that make the channel from earlier ones
    OUTGOING = "outgoing"  # weights that carry the channel to later ones
    BIAS = "bias"  # added to the channel by its own layer
    SCALE = "scale"  # factor of a normalisation, or any learned factor
    SHIFT = "shift"  # offset of a normalisation, or any learned offset
    MEAN = "mean"  # running mean of a BatchNorm
    VARIANCE = "variance"  # running variance of a BatchNorm


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the channels of a site lie in one tensor.

    Channel ``c`` of the site takes the entries ``start + c * block`` to ``start + (c + 1) * block - 1``
    along dimension ``dim``.

    Attributes:
        tensor: Name in the state dict.
        dim: Dimension, ``>= 0``.
        role: What the entries do for the channel.
        start: First entry of channel 0.
        block: Consecutive entries that each channel takes (49 where a 7x7 map was flattened).
        persistent: Whether a state dict keeps the tensor; the frequencies of a rotary embedding it does not.
    """

    tensor: str
    dim: int
    role: Role
    start: int = 0
    block: int = 1
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that a module keeps of a site's width, and that its forward pass reads: a head's width.

    Attributes:
        module: Path of the module.
        name: The attribute.
        victim: Its value in the victim.
        step: What each confusion channel adds to it. A flag (a bool) has no step: it is turned over in a
            network that has confusion channels.
    """

    module: str
    name: str
    victim: int | bool
    step: int = 0

    def value(self, count: int) -> int | bool:
        """Its value in a network with ``count`` confusion channels at the site."""
        if isinstance(self.victim, bool):
            return self.victim != bool(count)
        return self.victim + self.step * count


@dataclass(frozen=True, slots=True)
class Site:
    """A set of tensor dimensions that carry the same channels and must be widened together.

    Attributes:
        name: Unique in its network: the layer that makes the channels.
        width: Number of channels ``C >= 1``.
        slots: Where the channels lie; at least one is incoming and one outgoing.
        stream: Whether additions of activations tie the channels (a residual stream).
        contracted: Whether activations are multiplied with one another over the channels (queries with
            keys). A channel of such a site is silent only if what comes in is zero, too.
        settings: Attributes of modules that follow the width.
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    stream: bool = False
    contracted: bool = False
    settings: tuple[Setting, ...] = ()


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
