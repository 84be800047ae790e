"""Prove sites by probing: insert channels that go nowhere, and see that nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepenc.errors import DeepencError, TraceError
from deepenc.network.graph import call
from deepenc.network.sites import Role, Site
from deepenc.network.surgery import Layout, insert, replace_tensors

Refuted = list[tuple[Site, str]]


def prove(model: nn.Module, example: Any, sites: Sequence[Site]) -> tuple[list[Site], Refuted]:
    """Divide sites into those that a probe insertion confirms and those that it refutes.

    All sites are probed at once, each with its own number of channels (1 to 3), so that widths that
    depend on one another show. A probe that fails is halved until the sites at fault are single.

    Args:
        model: The network; untouched.
        example: Its example input.
        sites: Candidates.

    Returns:
        The proved sites, and the others with reasons.
    """
    model = replace_tensors(model, _telling(model)).eval()
    expected = outputs(model, example)
    if not all(bool(torch.isfinite(x).all() and x.any()) for x in expected if not x.is_meta):
        raise TraceError(
            "the network's outputs on the example are not finite, or all zero, and so prove nothing; "
            "give another example input, or repair the weights"
        )
    counts = {site.name: 1 + index % 3 for index, site in enumerate(sites)}
    refuted: Refuted = []

    def confirmed(part: Sequence[Site]) -> list[Site]:
        if not part:
            return []
        reason = _probe(model, example, part, counts, expected)
        if reason is None:
            return list(part)
        if len(part) == 1:
            refuted.append((part[0], reason))
            return []
        half = len(part) // 2
        return confirmed(part[:half]) + confirmed(part[half:])

    proved = confirmed(sites)
    if refuted and proved and _probe(model, example, proved, counts, expected) is not None:
        # Each alone is right, together they are not: no choice among them can be defended.
        refuted += [(site, "it is right alone, but not together with other sites") for site in proved]
        proved = []
    return proved, refuted


def _telling(model: nn.Module) -> dict[str, Tensor]:
    """The network's own tensors, but random where a parameter is all zero and would hide what leads to it.

    A classifier's head is often initialised to zero; without this, every site would pass the probe.
    """
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
            tensors[name] = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter)
    return tensors


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that a network returns on an example."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(call(model, example)) if isinstance(leaf, Tensor)]


def _probe(
    model: nn.Module,
    example: Any,
    sites: Sequence[Site],
    counts: dict[str, int],
    expected: Sequence[Tensor],
) -> str | None:
    """Why an insertion at these sites is not neutral; None if it is."""
    try:
        layout = Layout(
            sites, {s.name: tuple(range(s.width // 2, s.width // 2 + counts[s.name])) for s in sites}
        )
        widened = insert(model, layout)
        _fill(widened, layout)
        got = outputs(widened, example)
    except DeepencError as error:
        return str(error)
    except Exception as error:
        return f"the widened network does not run: {type(error).__name__}: {error}"
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return "the widened network returns other shapes"
    for ours, theirs in zip(got, expected, strict=True):
        if not ours.is_meta and not _close(ours, theirs):
            return "the outputs change though nothing leads to them"
    return None


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    if not theirs.is_floating_point():
        return bool(torch.equal(ours, theirs))
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    return bool((ours - theirs).abs().le(torch.finfo(theirs.dtype).eps ** 0.5 * scale).all())


def _fill(network: nn.Module, layout: Layout) -> None:
    """Random values for what comes in, positive ones for factors and variances, zero for what goes out."""
    state = network.state_dict()
    generator = torch.Generator().manual_seed(0)
    for outgoing in (False, True):
        for site in layout.sites:
            for slot in site.slots:
                if (slot.role is Role.OUTGOING) is not outgoing:
                    continue
                tensor = state[slot.tensor]
                if tensor.is_meta:
                    continue
                entries = layout.forged(site, slot)
                shape = list(tensor.shape)
                shape[slot.dim] = len(entries)
                values = torch.zeros(shape)
                if not outgoing:
                    values = torch.randn(shape, generator=generator) * 0.1
                    if slot.role in {Role.SCALE, Role.VARIANCE}:
                        values = values.abs() + 0.5
                tensor.index_copy_(slot.dim, entries.to(tensor.device), values.to(tensor))
