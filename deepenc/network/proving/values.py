"""Prove sites of a network that has no values: make values up, for all of it or for one part at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_with_path

from deepenc.errors import TraceError
from deepenc.network.calling import Arguments, arguments_seen
from deepenc.network.guard import first_line
from deepenc.network.proving.settings import home_of, inside
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors, replace_tensors

WHOLE = 2**26
"""Most numbers of a network that is given values as a whole; 256 MiB in single precision."""
PART = 2**28
"""Most numbers of a part of one."""

Verdict = Mapping[str, str | None]
"""Site name -> why it is none, or None."""
Divide = Callable[[nn.Module, Any, Sequence[Site]], Verdict]


def with_values(model: nn.Module, example: Any, sites: Sequence[Site], divide: Divide) -> Verdict:
    """Prove sites on random values.

    Args:
        model: A network on the meta device; untouched.
        example: Its example input, on the meta device.
        sites: Sites of it, with their settings.
        divide: Proves sites of a network that has values.
    """
    if sites and _numbers(model) <= WHOLE:
        try:
            return divide(made_up(model), inputs_made_up(example), sites)
        except TraceError:
            pass  # made up inputs do not suit every network; its parts may ask for less
    parts: dict[str, list[Site]] = defaultdict(list)
    seen = arguments_seen(model, example, [name for name, _ in model.named_modules() if name])
    for site in sites:
        home = home_of(site)
        while home and not seen[home]:  # a list of modules is not called
            home = home.rpartition(".")[0]
        parts[home].append(site)
    verdict: dict[str, str | None] = {}
    known: dict[Hashable, list[str | None]] = {}
    for home, members in parts.items():
        inner = [_within(home, site) for site in members]
        part = model.get_submodule(home)
        kind = _kind(part, inner)
        if kind not in known:
            given = seen[home][0] if home else example
            known[kind] = _proved(part, home, given, inner, divide)
        verdict.update(zip((site.name for site in members), known[kind], strict=True))
    return verdict


def _proved(
    part: nn.Module, home: str, given: Any, sites: Sequence[Site], divide: Divide
) -> list[str | None]:
    if (size := _numbers(part)) > PART:
        why = (
            f"{home or 'the network'}, in which it lies, has {size:,} numbers, too many to make values up for"
        )
        return [f"{why}; load the network with its weights and look again"] * len(sites)
    try:
        verdict = divide(made_up(part), inputs_made_up(given), sites)
    except TraceError as error:
        why = (
            f"{home or 'the network'}, in which it lies, does not run on made up values ({first_line(error)})"
        )
        return [f"{why}; load the network with its weights and look again"] * len(sites)
    return [verdict[site.name] for site in sites]


def _numbers(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in {id(t): t for t in named_tensors(model).values()}.values())


def _within(home: str, site: Site) -> Site:
    return replace(
        site,
        slots=tuple(replace(slot, tensor=inside(home, slot.tensor)) for slot in site.slots),
        settings=tuple(replace(s, module=inside(home, s.module)) for s in site.settings),
    )


def _kind(part: nn.Module, sites: Sequence[Site]) -> Hashable:
    """What parts have in common that are proved at once, as the layers of a large network."""
    return (
        tuple((name, type(module), _flags(module)) for name, module in part.named_modules()),
        tuple((name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(part).items()),
        tuple(replace(site, name="") for site in sites),
    )


def _flags(module: nn.Module) -> Hashable:
    return tuple((name, x) for name, x in vars(module).items() if isinstance(x, bool | float | str))


def made_up(model: nn.Module) -> nn.Module:
    """A copy with random values, in single precision where they were to be of less."""
    generator = torch.Generator().manual_seed(2)
    made: dict[int, Tensor] = {}
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            made[id(tensor)] = _values(name.rpartition(".")[2], tensor, generator)
    return replace_tensors(model, {name: made[id(tensor)] for name, tensor in tensors.items()})


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu")
    if not isinstance(tensor, nn.Parameter):
        return (torch.rand(tensor.shape, generator=generator) + 0.5).to(_precise(tensor))
    values = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() > 1:
        values /= math.sqrt(max(1, tensor[0].numel()))
    else:
        values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return values.to(_precise(tensor))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def inputs_made_up(example: Any) -> Any:
    """Random inputs in the place of those without values: small numbers, and masks that mask nothing."""
    generator = torch.Generator().manual_seed(3)
    made: dict[int, Tensor] = {}

    def fill(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        if id(leaf) not in made:
            if leaf.is_floating_point():
                values = torch.randn(leaf.shape, generator=generator).to(_precise(leaf))
            elif leaf.dtype is torch.bool or "mask" in str(path):
                values = torch.ones_like(leaf, device="cpu")
            else:
                values = torch.randint(2, leaf.shape, generator=generator).to(leaf.dtype)
            made[id(leaf)] = values
        return made[id(leaf)]

    if isinstance(example, Arguments):
        return Arguments(*tree_map_with_path(fill, tuple(example)))
    return tree_map_with_path(fill, example)
