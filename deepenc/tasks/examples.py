"""Examples of a data set: inputs with their targets, in memory, or read when they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepenc import trees
from deepenc.errors import VictimError

Collate = Callable[[Sequence[Any]], Any]
"""Makes a batch of items ``(input, target)``: inputs and targets."""


class Batch(NamedTuple):
    """Inputs and targets of some examples; targets are None where none are given."""

    inputs: Any
    targets: Any


@dataclass(frozen=True, eq=False)
class _Source:
    """Where examples that are not in memory come from."""

    dataset: Dataset[Any]
    indices: Tensor
    collate: Collate
    labelled: bool
    workers: int
    device: torch.device
    digests: dict[int, bytes] = field(default_factory=dict)
    """Those that are known, by the index in the data set; all parts of one source share them."""


# Kept apart: whoever holds some examples of a data set has no way to the others.
_sources: WeakKeyDictionary[Examples, _Source] = WeakKeyDictionary()


class Examples:
    """Some examples of a data set, in a fixed order.

    Args:
        inputs: What a network takes, as a batch: a tensor, a tuple of arguments, a dict of keyword
            arguments, the examples along the first dimension; or a list with an entry for each example.
        targets: What is expected of each, in the same form; None where they are not known.

    Raises:
        VictimError: There are more targets than inputs, or fewer.
    """

    __slots__ = ("__weakref__", "_stored")

    def __init__(self, inputs: Any, targets: Any = None) -> None:
        if targets is not None and trees.size(inputs) != trees.size(targets):
            raise VictimError(
                f"expected a target for each input, got {trees.described(inputs)} and "
                f"{trees.described(targets)}"
            )
        self._stored: Batch | None = Batch(inputs, targets)

    @classmethod
    def read(cls, dataset: Dataset[Any], collate: Collate | None = None, *, workers: int = 0) -> Examples:
        """Examples that are read when they are needed, and not kept.

        Args:
            dataset: A map-style data set of items ``(input, target)``.
            collate: Makes a batch of items; default: tensors of one shape are stacked.
            workers: Processes that read ahead while a network is trained; 0 reads in this one.
        """
        every = torch.arange(len(dataset))  # type: ignore[arg-type]
        return cls._of(_Source(dataset, every, collate or pairs, True, workers, torch.device("cpu")))

    @classmethod
    def _of(cls, source: _Source) -> Examples:
        made = cls(None)
        made._stored = None
        _sources[made] = source
        return made

    def __deepcopy__(self, memo: dict[int, object]) -> Examples:
        """Nothing of it can be changed; in-memory tensors are whoever's who made it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: with all that is needed to read them."""
        return (Examples, tuple(self._stored)) if self._stored is not None else (_again, (_sources[self],))

    def __len__(self) -> int:
        """Number of examples."""
        if self._stored is None:
            return len(_sources[self].indices)
        return trees.size(self._stored.inputs)

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Examples:
        """Some of the examples; nothing is read."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.int64)
        if self._stored is None:
            source = _sources[self]
            return self._of(replace(source, indices=source.indices[index]))
        return Examples(trees.take(self._stored.inputs, index), trees.take(self._stored.targets, index))

    @property
    def stored(self) -> bool:
        """Whether they are in memory."""
        return self._stored is not None

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        if self._stored is None:
            return _sources[self].device
        found = trees.tensors(self._stored.inputs)
        return found[0].device if found else torch.device("cpu")

    @property
    def inputs(self) -> Any:
        """Inputs of all, as one batch; read at once where they are not in memory."""
        return self.batch().inputs

    @property
    def targets(self) -> Any:
        """Targets of all, as one batch; read at once where they are not in memory."""
        return self.batch().targets

    def batch(self, index: Tensor | Sequence[int] | None = None) -> Batch:
        """Some of the examples as a batch, or all; a copy, except of all where they are in memory.

        Raises:
            VictimError: An example cannot be read, or differs in form from the others.
        """
        if self._stored is not None:
            if index is None:
                return self._stored
            chosen = torch.as_tensor(index, dtype=torch.int64)
            return Batch(*(trees.take(part, chosen) for part in self._stored))
        source = _sources[self]
        indices = source.indices if index is None else source.indices[torch.as_tensor(index)]
        read = source.collate([_item(source.dataset, i) for i in indices.tolist()])
        inputs, targets = trees.move(tuple(read), source.device)
        return Batch(inputs, targets if source.labelled else None)

    def batches(self, size: int) -> Iterator[Batch]:
        """All examples in order, in batches."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(len(self), start + size)))

    def without_targets(self) -> Examples:
        """The same examples, with nothing told of what is expected."""
        if self._stored is not None:
            return Examples(self._stored.inputs)
        return self._of(replace(_sources[self], labelled=False))

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device; those in memory are copied where they are elsewhere."""
        if self._stored is not None:
            return Examples(*trees.move(self._stored, device))
        return self._of(replace(_sources[self], device=torch.device(device)))

    def kept(self) -> Examples:
        """The same examples, in memory that is nobody else's if they are in memory at all."""
        if self._stored is None:
            return self[:]
        return Examples(*trees.move(self._stored, self.device, copy=True))

    def loader(self, order: Iterable[list[int]]) -> DataLoader[Batch]:
        """Batches in an order, read ahead where the examples are not in memory.

        Args:
            order: The indices of each batch.
        """
        source = _sources.get(self)
        return DataLoader(
            _View(self if source is None else self.to("cpu")),
            batch_size=None,  # the sampler gives the indices of whole batches
            sampler=order,
            num_workers=0 if source is None else source.workers,
            generator=torch.Generator(),  # for workers; without one it would draw from the global generator
        )

    def digests(self) -> list[bytes]:
        """SHA-256 of every example's inputs, by what a data set says of it (``digest(i)``), or by reading it.

        Each example of a data set is asked for, or read, once.

        Raises:
            VictimError: An example cannot be read.
        """
        source = _sources.get(self)
        if source is None:
            return [_digest(one) for one in trees.examples_of(self.inputs)]
        places = source.indices.tolist()
        missing = [at for at, place in enumerate(places) if place not in source.digests]
        told = getattr(source.dataset, "digest", None)
        if callable(told):
            new = [told(places[at]) for at in missing]
        else:
            parts = self[missing].batches(32)
            new = [_digest(one) for part in parts for one in trees.examples_of(part.inputs)]
        source.digests.update(zip((places[at] for at in missing), new, strict=True))
        return [source.digests[place] for place in places]


def _again(source: _Source) -> Examples:
    return Examples._of(source)


def marks(examples: Examples) -> str:
    """SHA-256 (hex) of all inputs and targets, in order.

    A data set that has ``digest(i)`` and ``target(i)`` is asked for these; any other is read.

    Raises:
        VictimError: An example cannot be read.
    """
    total = hashlib.sha256()
    source = _sources.get(examples)
    target = None if source is None else getattr(source.dataset, "target", None)
    if source is not None and callable(target):
        for index, digest in zip(source.indices.tolist(), examples.digests(), strict=True):
            total.update(digest + repr(target(index)).encode())
        return total.hexdigest()
    for part in examples.batches(256 if examples.stored else 32):
        for tree in part:
            for one in trees.examples_of(tree) if tree is not None else ():
                total.update(_digest(one))
    return total.hexdigest()


def examples_of(data: Any) -> Examples | None:
    """Examples from what a user has.

    Args:
        data: Examples; or a batch of inputs, as `Examples` takes them; or a data set of pairs
            ``(input, target)``; or None.
    """
    if data is None or isinstance(data, Examples):
        return data
    return Examples.read(data) if isinstance(data, Dataset) else Examples(data)


def joined(parts: Sequence[Examples]) -> Examples:
    """Several examples one after the other, without their targets."""
    held = [part for part in parts if len(part)]
    if len(held) == 1:
        return held[0].without_targets()
    if not held:
        return parts[0].without_targets()
    if all(part.stored for part in held):
        return Examples(trees.join([part.inputs for part in held]))
    first = _sources[next(part for part in held if not part.stored)]
    every = torch.arange(sum(map(len, held)))
    return Examples._of(
        replace(first, dataset=_Joined(held), indices=every, collate=_unpaired, labelled=False, digests={})
    )


class _Joined(Dataset[Any]):
    """Examples of several sources, one after the other."""

    def __init__(self, parts: Sequence[Examples]) -> None:
        self._places = [(part, i) for part in parts for i in range(len(part))]

    def __getitem__(self, index: int) -> Any:
        part, at = self._places[index]
        return part.batch([at]).inputs, None


def _unpaired(items: Sequence[Any]) -> Any:
    return trees.join([item[0] for item in items]), None


class _View(Dataset[Batch]):
    """What a loader reads: batches by the lists of their indices."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, index: Any) -> Batch:
        return self._examples.batch(index)


def pairs(items: Sequence[Any]) -> tuple[Any, Any]:
    """Items ``(input, target)`` as inputs and targets, stacked.

    Raises:
        VictimError: They differ in form.
    """
    return trees.stack([item[0] for item in items]), trees.stack([item[1] for item in items])


def _item(dataset: Dataset[Any], index: int) -> Any:
    try:
        item = dataset[index]
    except VictimError:
        raise
    except Exception as error:  # a user's data set, or a library that reads damaged files
        raise VictimError(
            f"example {index} of {type(dataset).__name__} cannot be read ({type(error).__name__}: {error}); "
            "repair or remove it"
        ) from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise VictimError(
            f"example {index} of {type(dataset).__name__}: expected a pair (input, target), got "
            f"{trees.described(item)}"
        )
    return item


def _digest(one: Any) -> bytes:
    total = hashlib.sha256()
    for tensor in trees.tensors(one):
        flat = tensor.detach().cpu().contiguous().flatten()
        total.update(f"{flat.dtype} {tuple(tensor.shape)} ".encode())
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy().data)
    return total.digest()
