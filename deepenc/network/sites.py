"""What can be widened: sites and their slots, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

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

    @property
    def module(self) -> str:
        """Path of the module that the tensor belongs to."""
        return self.tensor.rpartition(".")[0]

    def span(self, width: int) -> slice:
        """The entries of all channels of a site of that width, along the dimension."""
        return slice(self.start, self.start + width * self.block)

    def entries(self, channels: Sequence[int] | Tensor) -> Tensor:
        """The entries of some channels along the dimension, ``(channels * block,)``, in their order."""
        first = torch.as_tensor(channels, dtype=torch.int64) * self.block + self.start
        return first if self.block == 1 else (first[:, None] + torch.arange(self.block).to(first)).flatten()

    def part(self, tensor: Tensor, width: int) -> Tensor:
        """What all channels have in a tensor, as a view of it; ``width * block`` entries along the dimension.

        Args:
            tensor: The tensor that the slot is in; any tensor of its shape will do.
            width: Channels of the slot's site.

        Raises:
            SiteError: The slot reaches outside the tensor.
        """
        span = self.span(width)
        if self.dim >= tensor.ndim or span.stop > tensor.shape[self.dim]:
            raise SiteError(
                f"slot [{span.start}, {span.stop}) of dimension {self.dim} does not fit tensor "
                f"{self.tensor!r} of shape {tuple(tensor.shape)}; is the site list of another network?"
            )
        return tensor.narrow(self.dim, self.start, width * self.block)

    def rows(self, tensor: Tensor, width: int) -> Tensor:
        """As `part`, one row a channel: ``(width, features)``; a view where possible."""
        return self.part(tensor, width).movedim(self.dim, 0).reshape(width, -1)

    def along(self, values: Tensor, ndim: int) -> Tensor:
        """One value a channel, repeated over its entries; broadcasts along the dimension of ``ndim``."""
        return broadcast(values.repeat_interleave(self.block), self.dim, ndim)

    def over(self, values: Tensor, tensor: Tensor, rest: float) -> Tensor:
        """As `along`, for all entries of the dimension: ``rest`` where they are no channel of the site."""
        each = values.repeat_interleave(self.block)
        after = tensor.shape[self.dim] - self.start - len(each)
        return broadcast(pad(each, (self.start, after), value=rest), self.dim, tensor.ndim)


def broadcast(values: Tensor, dim: int, ndim: int) -> Tensor:
    """Values, ``(size,)``, in a shape that broadcasts along one of ``ndim`` dimensions."""
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


@dataclass(frozen=True, slots=True)
class Setting:
    """A number that a module keeps of a site's width, and that its forward pass reads: a head's width.

    Attributes:
        module: Path of the module.
        name: The attribute.
        victim: Its value in the victim.
        step: What each confusion channel adds to it. A flag (a bool) has no step: it is negated in a
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

    def rows(self, tensors: Mapping[str, Tensor], role: Role) -> Iterator[tuple[Slot, Tensor]]:
        """Each slot of a role with its rows, ``(width, features)``, in the order of the slots."""
        for slot in self.slots:
            if slot.role is role:
                yield slot, slot.rows(tensors[slot.tensor], self.width)
