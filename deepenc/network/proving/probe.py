"""Insert channels that lead nowhere, run the network, and see that nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepenc.errors import DeepencError
from deepenc.network.attention import adapt
from deepenc.network.calling import call
from deepenc.network.sites import Role, Setting, Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import Layout, insert
from deepenc.network.tracing.admit import tensors_in
from deepenc.network.tracing.dry import DryRun


@dataclass(frozen=True, eq=False)
class Expected:
    """What a network does on an example.

    Attributes:
        outputs: All tensors that it returns.
        constants: The plain numbers by which it multiplies, in order. A network that scales by its own
            width has others when it is widened, which values may hide, and on the meta device do.
    """

    outputs: list[Tensor]
    constants: list[float]

    @classmethod
    def of(cls, model: nn.Module, example: Any) -> Self:
        """Run a network on an example: a tensor, a tuple or dict of them, or `Arguments`."""
        with torch.no_grad(), _Constants() as log:
            result = call(model, example)
        return cls(tensors_in(result), log.found)


class _Constants(DryRun):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Collects the plain numbers by which a network multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = op.overloadpacket.__name__
        given = [*args, *(kwargs or {}).values()]
        factors = name.removesuffix("_") in {"mul", "div"}
        self.found += [x for x in given if type(x) is float or (factors and type(x) is int)]
        if factors and any(isinstance(x, Tensor) and x.is_meta for x in given):
            self.found += [float(x) for x in given if isinstance(x, Tensor) and not (x.is_meta or x.dim())]
        elif name.startswith("_scaled_dot_product"):
            self.found.append((kwargs or {}).get("scale") or args[0].shape[-1] ** -0.5)
        return self.run(op, args, kwargs or {})


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
    # One channel more the second time, and at both ends: what fits one number or one place fits not both.
    first = {s.name: tuple(range(s.width // 2, s.width // 2 + counts[s.name])) for s in sites}
    second = {s.name: (0, *range(s.width + 1, s.width + 1 + counts[s.name])) for s in sites}
    constants: Sequence[float] | None = None
    for positions in (first, second):
        try:
            layout = Layout(sites, positions)
            widened = insert(model, layout)
            _fill(widened, layout)
            got = Expected.of(widened, example)
        except DeepencError as error:
            return str(error)
        except Exception as error:
            return f"the widened network does not run: {type(error).__name__}: {error}"
        if [tensor.shape for tensor in got.outputs] != [tensor.shape for tensor in expected.outputs]:
            return "the widened network returns other shapes"
        if constants is None:
            constants = _constants(model, example, sites, expected)
        if not _same_constants(got.constants, constants):
            return "the network scales it by its own width"
        if not same(got.outputs, expected.outputs):
            return "the outputs change though nothing leads to them"
    return None


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether outputs agree up to the rounding of sums in another order; on the meta device, always."""
    return all(a.is_meta or _close(a, b) for a, b in zip(ours, theirs, strict=True))


def _constants(model: nn.Module, example: Any, sites: Sequence[Site], expected: Expected) -> Sequence[float]:
    """The constants of the unwidened network, made to compute in the way in which the widened one does."""
    if not any(_switches(model, sites)):
        return expected.constants
    turned = replace_tensors(model, named_tensors(model))
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
    return len(ours) == len(theirs) and all(map(math.isclose, ours, theirs))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    if not theirs.is_floating_point():
        return bool(torch.equal(ours, theirs))
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return bool((ours - theirs).abs().le(torch.finfo(theirs.dtype).eps ** 0.5 * scale).all())


def _fill(network: nn.Module, layout: Layout) -> None:
    """Random values for what comes in, positive ones for factors and variances, zero for what goes out.

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
                    values = torch.randn(shape, generator=generator) * 0.1
                    if slot.role in {Role.SCALE, Role.VARIANCE}:
                        values = values.abs() + 0.5
                tensor.index_copy_(slot.dim, entries.to(tensor.device), values.to(tensor))
