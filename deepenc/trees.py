"""Batches of any form: tensors with the examples along their first dimension, in tuples and dicts, or lists.

A list holds an entry for each example (a detector's images, which differ in size); a tuple holds a network's
arguments, a dict its keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from deepenc.errors import VictimError


def size(tree: Any) -> int:
    """Number of examples in a batch; 0 where it holds neither tensors nor lists.

    >>> size((torch.zeros(3, 2), torch.zeros(3))), size([torch.zeros(2), torch.zeros(5)])
    (3, 2)
    """
    if isinstance(tree, Tensor):
        return len(tree) if tree.ndim else 0
    if isinstance(tree, list):
        return len(tree)
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ()
    return next((count for part in parts if (count := size(part))), 0)


def take(tree: Any, index: slice | Tensor) -> Any:
    """Some examples of a batch: by a slice as views, by indices ``(examples,)`` as copies."""
    if isinstance(tree, Tensor):
        return tree[index if isinstance(index, slice) else index.to(tree.device)]
    if isinstance(tree, list):
        return tree[index] if isinstance(index, slice) else [tree[i] for i in index.tolist()]
    if isinstance(tree, dict):
        return {name: take(part, index) for name, part in tree.items()}
    return tuple(take(part, index) for part in tree) if isinstance(tree, tuple) else tree


def join(trees: Sequence[Any]) -> Any:
    """Batches of one form, one after the other."""
    first = trees[0]
    if isinstance(first, Tensor):
        return first if len(trees) == 1 else torch.cat(list(trees))
    if isinstance(first, list):
        return [entry for tree in trees for entry in tree]
    if isinstance(first, dict):
        return {name: join([tree[name] for tree in trees]) for name in first}
    return tuple(map(join, zip(*trees, strict=True))) if isinstance(first, tuple) else first


def stack(items: Sequence[Any]) -> Any:
    """Examples of one form as a batch.

    Raises:
        VictimError: They differ in structure or shape; says which.
    """
    first = items[0]
    if isinstance(first, np.ndarray | np.generic):
        items = [torch.as_tensor(item) for item in items]
    elif isinstance(first, bool | int | float):
        return torch.tensor(items)
    if isinstance(items[0], Tensor):
        for at, item in enumerate(items):
            if not isinstance(item, Tensor) or (item.shape, item.dtype) != (items[0].shape, items[0].dtype):
                raise _differing(at, items[0], item)
        return torch.stack(list(items))
    for at, item in enumerate(items):
        keys = [sorted(map(str, x)) if isinstance(x, dict) else len(x) for x in (first, item) if _nested(x)]
        if type(item) is not type(first) or (keys and keys[0] != keys[-1]):
            raise _differing(at, first, item)
    if isinstance(first, dict):
        return {name: stack([item[name] for item in items]) for name in first}
    if isinstance(first, tuple):
        return tuple(stack(column) for column in zip(*items, strict=True))
    return first if first is None else list(items)


def _nested(item: Any) -> bool:
    return isinstance(item, dict | tuple)


def _differing(at: int, first: Any, item: Any) -> VictimError:
    return VictimError(
        f"examples of one batch differ in form: {described(item)} in place {at}, {described(first)} in place "
        "0; bring all to one form, for example by resizing or padding"
    )


def move(tree: Any, device: torch.device | str, *, copy: bool = False) -> Any:
    """A batch on a device."""
    return tree_map(lambda x: x.to(device, copy=copy) if isinstance(x, Tensor) else x, tree)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a batch, in a fixed order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def examples_of(tree: Any) -> list[Any]:
    """The examples of a batch one by one, each without the first dimension."""
    if isinstance(tree, Tensor):
        return list(tree)
    if isinstance(tree, list):
        return tree
    if isinstance(tree, dict):
        columns = {name: examples_of(part) for name, part in tree.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return list(zip(*map(examples_of, tree), strict=True)) if isinstance(tree, tuple) else [tree]


def described(value: Any) -> str:
    """What a value is, in a few words.

    >>> described({"ids": torch.zeros(2, 3)})
    '{ids: float32 (2, 3)}'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {described(part)}" for name, part in list(value.items())[:4]) + "}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} ({', '.join(map(described, value[:3]))})"
    return type(value).__name__


def chunks(tree: Any, most: int) -> list[Any]:
    """A batch in parts of at most so many examples, as equal as can be; views.

    >>> [len(part) for part in chunks(torch.zeros(5), 2)]
    [2, 2, 1]
    """
    count = size(tree)
    bounds = [len(part) for part in torch.arange(count).tensor_split(max(1, -(-count // most)))]
    starts = np.cumsum([0, *bounds]).tolist()
    return [take(tree, slice(start, start + held)) for start, held in zip(starts, bounds, strict=False)]


def split(tree: Any, most: int) -> list[Any]:
    """A batch in parts of so many examples, the last of what is left; views."""
    return [take(tree, slice(start, start + most)) for start in range(0, size(tree), most)]
