"""One tensor at a time: insert confusion entries into it, and take them out, in pieces along its rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepenc.encryption.defense import Neurons, Weights
from deepenc.encryption.disk.sharded.shards import Entry, Reader, steps
from deepenc.encryption.shelter import derived
from deepenc.network.sites import Site, Slot
from deepenc.network.surgery import Layout

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Pieces = Iterator[tuple[Tensor, Tensor]]
"""Pieces of one tensor, in order: as it is in the encrypted checkpoint, and as it is to be written."""


def unchanged(reader: Reader, entry: Entry) -> Pieces:
    """A tensor that has no confusion entries."""
    for block in reader.blocks(entry):
        yield block, block


class Inserter:
    """Inserts confusion entries. What it inserts depends on secret and tensor alone, not on the order.

    Args:
        layout: Where the victim's entries go.
        weights: Fill the confusion entries; of those that declare `Weights.per_tensor`.
        secret: 32 bytes.
    """

    encrypts: ClassVar[bool] = True

    def __init__(self, layout: Layout, weights: Weights, secret: bytes) -> None:
        self._layout, self._weights, self._secret = layout, weights, secret
        self._slots: dict[str, list[tuple[Site, tuple[Slot, ...]]]] = defaultdict(list)
        for site in layout.sites:
            if layout.positions[site.name]:
                for name in dict.fromkeys(slot.tensor for slot in site.slots):
                    slots = tuple(slot for slot in site.slots if slot.tensor == name)
                    self._slots[name].append((site, slots))

    def grown(self, entry: Entry) -> Entry:
        """The entry with its widened shape."""
        return replace(entry, shape=self._layout.widened_shape(entry.name, entry.shape))

    def pieces(self, reader: Reader, entry: Entry) -> Pieces:
        """Widen one tensor.

        Args:
            reader: Of the victim's file.
            entry: The victim's tensor, under the name that the sites have for it.

        Raises:
            PluginError: The weights broke their interface.
        """
        victim, grown = reader.read(entry), self.grown(entry)
        fills = [fill for site, slots in self._slots[entry.name] for fill in self._fill(site, slots, victim)]
        kept = self._layout.kept(entry.name, entry.shape)
        sources = {dim: _sources(index, grown.shape[dim]) for dim, index in kept.items()}
        for start, stop in steps(grown):
            rows = {0: sources[0][start:stop]} if 0 in sources else {}
            block = _take(victim if rows else victim[start:stop], {**sources, **rows})
            for dim, entries, values in fills:
                if dim == 0:
                    where, part = _between(entries, start, stop)
                    block.index_copy_(0, where, values[part])
                else:
                    block.index_copy_(dim, entries, values[start:stop])
            yield block, block

    def _fill(self, site: Site, slots: tuple[Slot, ...], victim: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Values for one site's slots in one tensor: dimension, widened entries along it, values."""
        neurons = Neurons.of(site, self._layout, {slots[0].tensor: victim})
        values = derived(self._weights, neurons, self._secret)
        return [
            (slot.dim, self._layout.confusion_entries(site, slot), value)
            for slot, value in zip(slots, values, strict=True)
        ]


class Remover:
    """Takes confusion entries out.

    Args:
        layout: Where the victim's entries are.
    """

    encrypts: ClassVar[bool] = False

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def grown(self, entry: Entry) -> Entry:
        """The entry with its narrowed shape."""
        return replace(entry, shape=self._layout.narrowed_shape(entry.name, entry.shape))

    def pieces(self, reader: Reader, entry: Entry) -> Pieces:
        """Narrow one tensor; never more than a piece of it is in memory.

        Args:
            reader: Of the encrypted file.
            entry: The encrypted tensor, under the name that the sites have for it.
        """
        kept = self._layout.kept(entry.name, self.grown(entry).shape)
        for start, stop in steps(entry):
            block = reader.read(entry, (start, stop))
            rows = {0: _between(kept[0], start, stop)[0]} if 0 in kept else {}
            yield block, _take(block, {dim: index.numpy() for dim, index in (kept | rows).items()})


def _sources(kept: Tensor, size: int) -> NDArray[np.int64]:
    """For each entry of a widened dimension the victim's entry there; for a forged one, one beside it."""
    result = np.zeros(size, dtype=np.int64)
    result[kept.numpy()] = np.arange(len(kept))
    return np.maximum.accumulate(result)


def _take(tensor: Tensor, entries: Mapping[int, NDArray[np.int64]]) -> Tensor:
    """Entries of a tensor along several dimensions; measured, numpy is 4 times as fast at it as torch."""
    bits = tensor.view(_BITS[tensor.element_size()]).numpy()
    for dim, index in entries.items():
        bits = np.take(bits, index, axis=dim)
    return torch.from_numpy(bits).view(tensor.dtype)


def _between(entries: Tensor, start: int, stop: int) -> tuple[Tensor, slice]:
    """Those of some ascending entries that lie in ``[start, stop)``, from there on, and their indices."""
    low, high = torch.searchsorted(entries, torch.tensor([start, stop])).tolist()
    return entries[low:high] - start, slice(low, high)
