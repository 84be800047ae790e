"""Equal floats: weights sampled from a network's own weights are copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.sites import Role, Site, Slot

ROLES = (Role.INCOMING, Role.OUTGOING)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Collisions(Attack):
    """Suspect channels whose weights occur again, bit for bit, in the same tensor.

    First every channel is scored by its share of such weights, incoming and outgoing ones counting alike.
    Then each group of equal weights is taken to have its original in its least suspect channel, and only
    the others count: a real channel that was copied from is cleared. Zeros do not count. Needs no data; in
    half precision real weights collide too, and the attack weakens.
    """

    name: ClassVar[str] = "collisions"
    detects: ClassVar[Weakness | None] = "duplicates"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        state = case.encrypted.state_dict()
        used = {slot.tensor for site in case.sites for slot in site.slots if slot.role in ROLES}
        values = {name: Values(state[name]) for name in used}
        first = {s.name: share(s, lambda slot: values[slot.tensor].repeated) for s in case.sites}
        suspicion = spread(case.sites, first, state)
        copied = {place: values[place[0]].copied(along) for place, along in suspicion.items()}
        scores = {s.name: share(s, lambda slot: copied[slot.tensor, slot.dim]) for s in case.sites}
        return Claim(scores={name: score.cpu() for name, score in scores.items()})


class Values:
    """Which entries of a tensor are equal, bit for bit.

    Attributes:
        group: Number of the value of each entry, shaped as the tensor.
        repeated: Whether the value occurs again and is not zero, shaped as the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        bits = tensor.detach().contiguous().view(BITS[tensor.element_size()])
        _, self.group, counts = torch.unique(bits, return_inverse=True, return_counts=True)
        self.repeated = (counts[self.group] > 1) & (tensor != 0)

    def copied(self, suspicion: Tensor) -> Tensor:
        """Repeated entries that are more suspect than another entry of their value; the tensor's shape.

        Args:
            suspicion: Per entry; broadcasts to the tensor's shape.
        """
        suspicion = suspicion.expand(self.group.shape)
        least = suspicion.new_full((int(self.group.max()) + 1,), torch.inf)
        least.scatter_reduce_(0, self.group.flatten(), suspicion.flatten(), "amin")
        copied: Tensor = self.repeated & (suspicion > least[self.group])
        return copied


def share(site: Site, marks: Callable[[Slot], Tensor]) -> Tensor:
    """Share of each channel's entries that are marked: the mean of its incoming and its outgoing share.

    Args:
        site: The site.
        marks: The marks of the tensor that a slot is in, of that tensor's shape.

    Returns:
        ``(width,)``, in [0, 1].
    """
    shares = []
    for role in ROLES:
        rows = [slot.rows(marks(slot), site.width) for slot in site.slots if slot.role is role]
        shares.append(torch.cat(rows, dim=1).double().mean(dim=1))
    return torch.stack(shares).mean(dim=0)


def spread(
    sites: Iterable[Site], scores: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[tuple[str, int], Tensor]:
    """Lay the scores of channels along the tensors that hold them.

    Returns:
        For each tensor and dimension that holds channels, the score of the channel that an entry belongs to
        along that dimension, 0 where it is no site's; broadcasts to the tensor's shape.
    """
    laid: dict[tuple[str, int], Tensor] = {}
    for site in sites:
        for slot in site.slots:
            if slot.role in ROLES:
                place, along = (slot.tensor, slot.dim), slot.over(scores[site.name], state[slot.tensor], 0.0)
                laid[place] = laid[place] + along if place in laid else along
    return laid
