"""Prove sites by probing: insert channels that go nowhere, and see that nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepenc.errors import TraceError
from deepenc.network.proving.probe import Expected, probe, same
from deepenc.network.proving.settings import complete
from deepenc.network.sites import Site
from deepenc.network.structure import replace_tensors

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
        The proved sites, with the settings that they need, and the others with reasons.
    """
    model = replace_tensors(model, _telling(model)).eval()
    expected = Expected.of(model, example)
    if not all(bool(torch.isfinite(x).all() and x.any()) for x in expected.outputs if not x.is_meta):
        raise TraceError(
            "the network's outputs on the example are not finite, or all zero, and so prove nothing; "
            "give another example input, repair the weights, or look in a submodule alone, with a scope"
        )
    refuted: Refuted = []
    heads = [site for site in sites if site.contracted]
    completed = dict(zip((site.name for site in heads), complete(model, example, heads), strict=True))
    candidates: list[Site] = []
    for site in sites:
        result = completed.get(site.name, site)
        if isinstance(result, str):
            refuted.append((site, result))
        else:
            candidates.append(result)
    counts = {site.name: 1 + index % 3 for index, site in enumerate(candidates)}

    def confirmed(part: Sequence[Site]) -> list[Site]:
        if not part:
            return []
        reason = probe(model, example, part, counts, expected)
        if reason is None:
            return list(part)
        if len(part) == 1:
            refuted.append((part[0], reason))
            return []
        half = len(part) // 2
        return confirmed(part[:half]) + confirmed(part[half:])

    before = len(refuted)
    proved = confirmed(candidates)
    if len(refuted) > before and proved and probe(model, example, proved, counts, expected) is not None:
        # Each alone is right, together they are not: no choice among them can be defended.
        refuted += [(site, "it is right alone, but not together with other sites") for site in proved]
        proved = []
    if refuted and not proved and not same(Expected.of(model, example).outputs, expected.outputs):
        raise TraceError(
            "the network gives other outputs each time, in eval mode too, and so proves nothing; take the "
            "randomness out of its forward pass"
        )
    return proved, refuted


def _telling(model: nn.Module) -> dict[str, Tensor]:
    """The network's own tensors, but random where a parameter is all zero and would hide what leads to it.

    A classifier's head is often initialised to zero; without this, every site would pass the probe.
    """
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        if not parameter.is_meta and parameter.is_floating_point() and not parameter.any():
            tensors[name] = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter)
    return tensors
