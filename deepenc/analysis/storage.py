"""How tensors are stored: their bits, and what lies about them in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def bits(tensor: Tensor) -> Tensor:
    """The stored bits, as integers of the entries' size; on the CPU."""
    return tensor.detach().cpu().contiguous().view(INTEGERS[tensor.element_size()])


def trailing_zeros(tensor: Tensor) -> Tensor:
    """Zero bits at the end of each mantissa: all of them for a power of two, and for 0; float64.

    Numbers that went through a type of less precision end in as many zeros as it lacks bits. Of an integer
    all bits but the sign count.
    """
    size = MANTISSA.get(tensor.dtype, 8 * tensor.element_size() - 1)
    mantissa = bits(tensor).long() & ((1 << size) - 1)
    lowest = (mantissa & -mantissa).clamp_min(1).double().log2()
    return torch.where(mantissa == 0, float(size), lowest)


def subnormal(tensor: Tensor) -> Tensor:
    """Which entries are so small that the type has less precision left; none of integers."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=torch.bool)
    values = tensor.detach().cpu()
    return (values != 0) & (values.abs() < torch.finfo(tensor.dtype).smallest_normal)


def shared_bits(tensors: Iterable[Tensor]) -> Tensor:
    """The bits, as int64, ascending, that occur in more than one of the tensors of one type."""
    own: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        own.setdefault(tensor.dtype, []).append(torch.unique(bits(tensor)))
    counted = [torch.unique(torch.cat(each), return_counts=True) for each in own.values()]
    repeated = [values[counts > 1].long() for values, counts in counted]
    return torch.unique(torch.cat(repeated)) if repeated else torch.empty(0, dtype=torch.int64)


def among(tensor: Tensor, known: Tensor) -> Tensor:
    """Which entries are not zero and have their bits among known ones, ascending, from `shared_bits`."""
    own = bits(tensor).long()
    if not len(known):
        return torch.zeros(own.shape, dtype=torch.bool)
    place = torch.searchsorted(known, own).clamp_max(len(known) - 1)
    return (known[place] == own) & (tensor.detach().cpu() != 0)


def hidden(tensor: Tensor) -> Tensor:
    """The entries of a tensor's storage that the tensor does not show, ``(entries,)``; on the CPU."""
    plain = tensor.detach()
    length = plain.untyped_storage().nbytes() // plain.element_size()
    shown = torch.zeros(length, dtype=torch.bool)
    if not length:
        return plain.new_empty(0, device="cpu")
    shown.as_strided(plain.shape, plain.stride(), plain.storage_offset()).fill_(True)
    return plain.as_strided((length,), (1,), 0).cpu()[~shown]
