"""What can be widened: sites and their slots, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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
    """

    tensor: str
    dim: int
    role: Role
    start: int = 0
    block: int = 1


@dataclass(frozen=True, slots=True)
class Site:
    """A set of tensor dimensions that carry the same channels and must be widened together.

    Attributes:
        name: Unique in its network: the layer that makes the channels.
        width: Number of channels ``C >= 1``.
        slots: Where the channels lie; at least one is incoming and one outgoing.
        stream: Whether additions of activations tie the channels (a residual stream).
    """

    name: str
    width: int
    slots: tuple[Slot, ...]
    stream: bool = False
