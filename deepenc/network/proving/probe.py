"""Insert channels that lead nowhere, run the network, and see that nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deepenc.errors import DeepencError
from deepenc.network.attention import adapt
from deepenc.network.guard import first_line
from deepenc.network.proving.reference import Expected, pristine, shared
from deepenc.network.sites import Role, Setting, Site
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, replace_widened, widened


def probe(
    model: nn.Module, example: Any, sites: Sequence[Site], counts: Mapping[str, int], expected: Expected
) -> str | None:
    """Why an insertion at these sites is not neutral; None if it is.

    Args:
        model: The network, in eval mode; untouched.
        example: As for `Expected.of`.
        sites: Sites to widen together.
        counts: How many channels each gets, by name.
        expected: What the network does without them.
    """
    constants: Sequence[float] = expected.constants
    generator = torch.Generator().manual_seed(0)
    # One channel more the second time, and elsewhere: what fits one number or one place fits not both.
    for more in (0, 1):
        positions = {s.name: _scattered(s.width, counts[s.name] + more, generator) for s in sites}
        try:
            layout = Layout(sites, positions)
            network = _widened(model, layout)
            _fill(network, layout)
            got = Expected.of(network, example)
        except DeepencError as error:
            return str(error)
        except Exception as error:  # the network's own code, at widths that it may not expect
            return f"the widened network does not run: {type(error).__name__}: {first_line(error)}"
        if [tensor.shape for tensor in got.outputs] != [tensor.shape for tensor in expected.outputs]:
            return "the widened network returns other shapes"
        if not _same_constants(got.constants, constants):
            constants = _constants(model, example, sites, expected)
            if not _same_constants(got.constants, constants):
                return "the network scales it by its own width"
        if not expected.agrees(got.outputs):
            return "the outputs change though nothing leads to them"
    return None


def _widened(model: nn.Module, layout: Layout) -> nn.Module:
    """What `insert` returns, but around the network's own parameters where they stay as they are."""
    own = named_tensors(model)
    wide = widened(own, layout)
    replaced = {id(own[name]) for name in wide}  # a tied tensor has several names, one of them in the layout
    return replace_widened(
        model, {n: t for n, t in shared(model).items() if id(own[n]) not in replaced} | wide, layout
    )


def _scattered(width: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Random places that are not their own mirror image: a network may reverse its channels."""
    while True:
        places = torch.randperm(width + count, generator=generator)[:count].sort().values
        if not torch.equal(places, (width + count - 1 - places).flip(0)):
            return tuple(places.tolist())


def _constants(model: nn.Module, example: Any, sites: Sequence[Site], expected: Expected) -> Sequence[float]:
    """The constants of the unwidened network, made to compute in the way in which the widened one does."""
    if not any(_switches(model, sites)):
        return expected.constants
    turned = pristine(model)
    as_widened(turned, sites)
    return Expected.of(turned, example).constants


def as_widened(model: nn.Module, sites: Sequence[Site]) -> None:
    """Make a network compute in the way in which it does when all of some sites have more channels.

    Args:
        model: The network, with more channels at some of the sites or at none; changed in place.
        sites: Those sites.
    """
    flags, attentions = _switches(model, sites)
    for flag in flags:
        setattr(model.get_submodule(flag.module), flag.name, not flag.victim)
    for attention in attentions:
        adapt(attention, wide=True)


def _switches(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Setting], list[nn.MultiheadAttention]]:
    """What of a network computes in another way with more channels: flags of modules, and attentions."""
    flags = [setting for site in sites for setting in site.settings if isinstance(setting.victim, bool)]
    homes = {slot.module for site in sites if site.contracted for slot in site.slots}
    modules = [model.get_submodule(home) for home in homes]
    return flags, [module for module in modules if isinstance(module, nn.MultiheadAttention)]


def _same_constants(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(math.isclose(a, b) or (a != a and b != b) for a, b in pairs)


def _fill(network: nn.Module, layout: Layout) -> None:
    """Large random values for what comes in, positive ones for factors and variances, zero for what goes out.

    Where channels are contracted (queries with keys) each is silent only if nothing comes in either.
    """
    state = named_tensors(network)
    generator = torch.Generator().manual_seed(0)
    for silent in (False, True):
        for site in layout.sites:
            for slot in site.slots:
                quiet = {Role.OUTGOING, *((Role.INCOMING, Role.BIAS, Role.SHIFT) if site.contracted else ())}
                tensor = state[slot.tensor].detach()
                if (slot.role in quiet) is not silent or tensor.is_meta:
                    continue
                entries = layout.confusion_entries(site, slot)
                shape = list(tensor.shape)
                shape[slot.dim] = len(entries)
                values = torch.zeros(shape)
                if not silent:
                    size = float(torch.linalg.vector_norm(tensor)) / math.sqrt(max(1, tensor.numel()))
                    values = torch.randn(shape, generator=generator) * min(max(0.1, 3 * size), 10.0)
                    if slot.role in {Role.SCALE, Role.VARIANCE}:
                        values = values.abs() + 0.5
                tensor.index_copy_(slot.dim, entries.to(tensor.device), values.to(tensor))
