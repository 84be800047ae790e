"""Insert channels into tensors and remove them again; removal is the exact inverse of insertion.

Everything here works on tensors, sites and positions alone; `deepenc.network.structure` then puts the
tensors into a network.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepenc.errors import SiteError
from deepenc.network.sites import Setting, Site, Slot
from deepenc.network.structure import State, named_tensors, replace_tensors

Positions = Mapping[str, tuple[int, ...]]
"""Site name -> sorted positions of its confusion channels among all its channels, real ones included."""


def check_positions(site: Site, positions: Sequence[int]) -> None:
    """Refuse positions that are not distinct, ascending, and inside the widened site.

    Raises:
        SiteError: They are not.
    """
    total = site.width + len(positions)
    ascending = all(a < b for a, b in itertools.pairwise(positions))
    if positions and not (ascending and positions[0] >= 0 and positions[-1] < total):
        raise SiteError(
            f"site {site.name!r}: expected ascending, distinct positions in [0, {total}), got {positions}"
        )


@dataclass(frozen=True, slots=True)
class _Insertion:
    """What is inserted along one dimension of one tensor."""

    end: int  # the victim's entries that the slots reach over
    inserted: NDArray[np.int64]  # inserted entries, in widened coordinates


class Layout:
    """Where every entry of the victim's tensors goes in the encrypted network.

    Args:
        sites: Sites of the victim.
        positions: Confusion positions per site name; a site not named gets no confusion channel.

    Raises:
        SiteError: Positions that do not fit a site, or name none.
    """

    def __init__(self, sites: Sequence[Site], positions: Positions) -> None:
        known = {site.name for site in sites}
        if strangers := sorted(set(positions) - known):
            raise SiteError(f"positions name sites that the network does not have: {strangers}")
        self.positions = {s.name: tuple(positions.get(s.name, ())) for s in sites}
        self.sites = tuple(sites)
        for site in sites:
            check_positions(site, self.positions[site.name])
        meeting: dict[tuple[str, int], list[tuple[Slot, Site]]] = defaultdict(list)
        for site in sites:
            for slot in site.slots:
                meeting[slot.tensor, slot.dim].append((slot, site))
        self._starts: dict[tuple[str, int, int], int] = {}
        self._insertions: dict[str, dict[int, _Insertion]] = defaultdict(dict)
        for (tensor, dim), entries in meeting.items():
            insertion = self._insertion(sorted(entries, key=lambda entry: entry[0].start))
            if len(insertion.inserted):
                self._insertions[tensor][dim] = insertion

    @classmethod
    def appended(cls, sites: Sequence[Site], counts: Mapping[str, int]) -> Layout:
        """Confusion channels behind the real ones: right in sizes; where they really are, the key knows."""
        widths = {site.name: site.width for site in sites}
        starts = {name: widths.get(name, 0) for name in counts}
        return cls(sites, {name: tuple(range(starts[name], starts[name] + n)) for name, n in counts.items()})

    def _insertion(self, entries: list[tuple[Slot, Site]]) -> _Insertion:
        pieces: list[NDArray[np.int64]] = []
        cursor = shift = 0
        for slot, site in entries:
            if slot.start < cursor:
                raise SiteError(f"site {site.name!r}: {slot} overlaps the slot before it")
            self._starts[slot.tensor, slot.dim, slot.start] = slot.start + shift
            inserted = self.widened_slot(slot).entries(self.positions[site.name]).numpy()
            pieces.append(inserted)
            cursor = slot.start + site.width * slot.block
            shift += len(inserted)
        return _Insertion(cursor, np.concatenate(pieces))

    def changed(self) -> Iterator[str]:
        """Names of the tensors that gain entries."""
        return iter(self._insertions)

    def widened_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a tensor after insertion."""
        sizes = list(shape)
        for dim, insertion in self._insertions.get(name, {}).items():
            if dim >= len(sizes):
                raise SiteError(
                    f"tensor {name!r} of shape {tuple(shape)} has no dimension {dim} to be widened; are the "
                    "sites or the key those of another network?"
                )
            sizes[dim] += len(insertion.inserted)
        return tuple(sizes)

    def narrowed_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a tensor after removal; the inverse of `widened_shape`."""
        grown = self.widened_shape(name, [0] * len(shape))
        return tuple(size - more for size, more in zip(shape, grown, strict=True))

    def kept(self, name: str, shape: Sequence[int]) -> dict[int, Tensor]:
        """For each widened dimension, where the victim's entries are in the widened tensor.

        Args:
            name: Tensor name.
            shape: The victim's shape of it.

        Raises:
            SiteError: A slot reaches outside the tensor.
        """
        result = {}
        for dim, insertion in self._insertions.get(name, {}).items():
            if dim >= len(shape) or insertion.end > shape[dim]:
                raise SiteError(
                    f"the sites reach to entry {insertion.end} of dimension {dim} of tensor {name!r}, whose "
                    f"shape is {tuple(shape)}; are the sites or the key those of another network?"
                )
            real = np.ones(shape[dim] + len(insertion.inserted), dtype=bool)
            real[insertion.inserted] = False
            result[dim] = torch.from_numpy(np.flatnonzero(real))
        return result

    def widened_slot(self, slot: Slot) -> Slot:
        """The slot as it lies in the widened tensor: its start moved by what was inserted before it."""
        return replace(slot, start=self._starts[slot.tensor, slot.dim, slot.start])

    def confusion_entries(self, site: Site, slot: Slot) -> Tensor:
        """Entries of a site's confusion channels along a slot of the widened tensor; ``(count * block,)``."""
        return self.widened_slot(slot).entries(self.positions[site.name])

    def widened_sites(self) -> tuple[Site, ...]:
        """The sites as a tracer of the encrypted network would see them: confusion channels included."""
        return tuple(
            replace(
                site,
                width=site.width + len(self.positions[site.name]),
                slots=tuple(self.widened_slot(slot) for slot in site.slots),
                settings=_settled(site, len(self.positions[site.name])),
            )
            for site in self.sites
        )


def narrow_sites(sites: Sequence[Site], channels: Positions) -> tuple[Site, ...]:
    """The sites of a network after removing channels; the inverse of `Layout.widened_sites`.

    Args:
        sites: Sites of the network that still has the channels.
        channels: Site name -> ascending positions of the channels to remove.

    Raises:
        SiteError: An unknown site, or one that would lose all its channels.
    """
    widths = {site.name: site.width for site in sites}
    for name, gone in channels.items():
        if len(gone) >= widths.get(name, 0):
            raise SiteError(
                f"cannot remove {len(gone)} channels of site {name!r}: it has {widths.get(name, 0)}"
            )
    moved: dict[Slot, Slot] = {}
    meeting = sorted(
        ((slot, site) for site in sites for slot in site.slots),
        key=lambda entry: (entry[0].tensor, entry[0].dim, entry[0].start),
    )
    for _, entries in itertools.groupby(meeting, key=lambda entry: (entry[0].tensor, entry[0].dim)):
        shift = 0
        for slot, site in entries:
            moved[slot] = replace(slot, start=slot.start - shift)
            shift += slot.block * len(channels.get(site.name, ()))
    return tuple(
        replace(
            site,
            width=site.width - len(channels.get(site.name, ())),
            slots=tuple(moved[slot] for slot in site.slots),
            settings=_settled(site, -len(channels.get(site.name, ()))),
        )
        for site in sites
    )


def _settled(site: Site, count: int) -> tuple[Setting, ...]:
    """A site's settings as a network with other widths has them; a flag stays as that network has it."""
    return tuple(
        replace(setting, victim=setting.value(count))
        for setting in site.settings
        if not isinstance(setting.victim, bool)
    )


def widen(tensor: Tensor, kept: Mapping[int, Tensor], shape: Sequence[int]) -> Tensor:
    """Spread a tensor's entries over a larger, zero-filled one.

    Args:
        tensor: Any shape and dtype.
        kept: From `Layout.kept`.
        shape: From `Layout.widened_shape`.
    """
    order = _order(tensor)
    result = tensor.new_zeros([shape[d] for d in order]).permute(_inverse(order))
    if not result.is_meta:
        _spread(result, tensor, sorted(kept.items()))
    return result


def _spread(target: Tensor, source: Tensor, kept: Sequence[tuple[int, Tensor]]) -> None:
    """Copy runs of consecutive entries along the last dimension, and by index along the first.

    Runs are long where few channels were inserted; measured, this takes a third to all of the time of
    copying by index along both.
    """
    if not kept:
        target.copy_(source)
        return
    *outer, (dim, index) = kept
    places = index.numpy()
    starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(places))
    for start, place, length in zip(starts.tolist(), places[starts].tolist(), lengths.tolist(), strict=True):
        part, piece = target.narrow(dim, place, length), source.narrow(dim, start, length)
        if len(outer) == 1:
            part.index_copy_(outer[0][0], outer[0][1].to(target.device), piece)
        else:
            _spread(part, piece, outer)


def narrow(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Take the victim's entries out of a widened tensor; the exact inverse of `widen`."""
    order = _order(tensor)
    for dim, index in kept.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.permute(order).contiguous().permute(_inverse(order))


def _order(tensor: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost: the same sums need the same order."""
    strides = tensor.stride()
    return (
        sorted(range(tensor.dim()), key=lambda d: -strides[d]) if 0 not in strides else [*range(tensor.dim())]
    )


def _inverse(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def widened(tensors: State, layout: Layout) -> dict[str, Tensor]:
    """The tensors that a layout changes, each with zero-filled confusion entries."""
    shapes = {name: tensors[name].shape for name in layout.changed()}
    return {
        name: widen(tensors[name], layout.kept(name, shape), layout.widened_shape(name, shape))
        for name, shape in shapes.items()
    }


def insert(network: nn.Module, layout: Layout) -> nn.Module:
    """A copy of a network with zero-filled confusion channels; the given network is untouched."""
    return replace_widened(network, widened(named_tensors(network), layout), layout)


def remove(network: nn.Module, layout: Layout) -> nn.Module:
    """A copy of a network without its confusion channels; the exact inverse of `insert`.

    Args:
        network: The widened network.
        layout: The layout it was widened by.

    Raises:
        SiteError: The network does not have the tensors or sizes of the layout.
    """
    state = named_tensors(network)
    tensors = {}
    for name in layout.changed():
        if name not in state:
            raise SiteError(f"the network has no tensor {name!r}; is the key of another network?")
        shape = layout.narrowed_shape(name, state[name].shape)
        tensors[name] = narrow(state[name], layout.kept(name, shape))
    return replace_widened(network, tensors, layout, inserted=False)


def replace_widened(model: nn.Module, tensors: State, layout: Layout, *, inserted: bool = True) -> nn.Module:
    """Copy a network's structure around tensors that a layout widened, or that it narrowed again.

    Args:
        model: The structure, as in `replace_tensors`.
        tensors: Names to tensors; taken as they are, not cloned.
        layout: Says which attributes of modules follow the widths.
        inserted: Whether the tensors have the confusion channels.

    Raises:
        SiteError: A tensor or a setting has no place in the model.
    """
    result = replace_tensors(model, tensors)
    for site in layout.sites:
        count = len(layout.positions[site.name])
        for setting in site.settings if count else ():
            try:
                module = result.get_submodule(setting.module)
                if type(getattr(module, setting.name)) not in (int, bool):
                    raise AttributeError(setting.name)
            except AttributeError as error:
                raise SiteError(
                    f"{type(model).__name__} has no number {setting.module}.{setting.name} to follow "
                    f"the width of site {site.name!r}; are the sites those of another network?"
                ) from error
            setattr(module, setting.name, setting.value(count if inserted else 0))
    return result
