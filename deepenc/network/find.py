"""Find the sites of a network, and prove each before it is returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from deepenc.errors import SiteError
from deepenc.network.calling import arguments_of
from deepenc.network.guard import foreign, guarded
from deepenc.network.proving.proof import prove
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.tracing.admit import admit_kind
from deepenc.network.tracing.axes import Channels, Owner
from deepenc.network.tracing.tracer import Traced, trace


@dataclass(frozen=True)
class LeftOut:
    """A layer's output width, or a part of it, that no site covers.

    Attributes:
        layer: Name of the tensor that makes the channels.
        channels: How many of its channels are not covered.
        reason: Why.
    """

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Analysis:
    """The sites of a network, and what was left out."""

    sites: tuple[Site, ...]
    left_out: tuple[LeftOut, ...] = field(default=())


def find_sites(model: nn.Module, example: Any, *, streams: bool = False, scope: str = "") -> list[Site]:
    """Find where confusion channels can be inserted into a network.

    Each site is proved: with random confusion channels of zero outgoing weight inserted at all sites, the
    network's outputs on the example are the original's. On the meta device, where there are no values, they
    are made up: for the whole network if it is small, else for one of its parts at a time.

    Args:
        model: Any network, in any mode and on any one device; untouched.
        example: An input: a tensor, or a tuple (positional) or dict (keywords) of arguments.
        streams: Include residual streams, whose channels additions tie over many layers. The paper inserts
            inside blocks only.
        scope: Path of a submodule (``backbone.body``) in which alone to look, where the whole network cannot
            be followed, as detectors cannot. It is followed on what it is given when the network runs.

    Raises:
        TraceError: The network does not run on the example.
        SiteError: It has no site.
    """
    sites = list(analyse(model, example, streams=streams, scope=scope).sites)
    if not sites:
        raise SiteError(
            f"{type(model).__name__} has no site: no layer's channels go to other layers alone; "
            "deepenc inspect --why lists each layer with its reason"
        )
    return sites


def analyse(model: nn.Module, example: Any, *, streams: bool = False, scope: str = "") -> Analysis:
    """Like `find_sites`, but explains what was left out instead of raising on an empty list."""
    admit_kind(model)
    with guarded(model):
        if scope:
            part, inputs = arguments_of(model, example, scope)
            return _outside(analyse(part, inputs, streams=streams), scope)
        return _analyse(model, example, streams)


def _analyse(model: nn.Module, example: Any, streams: bool) -> Analysis:
    traced = trace(model, example)
    channels = traced.channels
    candidates, left_out = _candidates(channels)
    with foreign(f"{type(model).__name__} cannot be saved", "mend its state_dict"):
        persistent = model.state_dict().keys()
    candidates = tuple(
        replace(
            site,
            slots=tuple(replace(slot, persistent=slot.tensor in persistent) for slot in site.slots),
        )
        for site in candidates
    )
    unwanted = () if streams else tuple(site for site in candidates if site.stream)
    candidates = tuple(site for site in candidates if streams or not site.stream)
    used = {owner.tensor for owner in channels.owners}
    left_out += [
        LeftOut(name, parameter.shape[0], _why_unused(parameter))
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in used
    ]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.dim() > 1}
    unfollowed = channels.unfollowed().items()
    left_out += [LeftOut(name, shapes[name][0], why) for name, why in unfollowed if name in shapes]
    readers = {site.name: reader for site in candidates if (reader := _idle_reader(model, traced, site))}
    proved, refuted = prove(model, example, [s for s in candidates if s.name not in readers], traced)
    for site, reason in [
        *((site, "it belongs to a residual stream (pass streams=True)") for site in unwanted),
        *((s, readers[s.name]) for s in candidates if s.name in readers),
        *((site, f"a probe insertion failed: {reason}") for site, reason in refuted),
    ]:
        made = [slot for slot in site.slots if slot.role is Role.INCOMING]
        sizes = Counter({slot.tensor: 0 for slot in made})
        for slot in made:
            sizes[slot.tensor] += site.width * slot.block
        left_out += [LeftOut(layer, size, reason) for layer, size in sizes.items()]
    return Analysis(tuple(proved), tuple(left_out))


def _idle_reader(model: nn.Module, traced: Traced, site: Site) -> str | None:
    """Why another input may break a site: values decide what runs, and a layer that did not run fits it."""
    if not traced.decided:
        return None
    sizes = {
        owner.size
        for owner in traced.channels.owners
        for s in site.slots
        if s.tensor == owner.tensor and s.dim == owner.dim
    }
    for name in sorted(traced.idle):
        for size in model.get_parameter(name).shape:
            if size > 1 and (size in sizes or size % site.width == 0):
                return (
                    f"values decide what runs, and {name}, which did not run on the example, may read "
                    "it; give an example on which it runs"
                )
    return None


def _why_unused(parameter: nn.Parameter) -> str:
    if not parameter.is_floating_point():
        return f"its entries are of {parameter.dtype}, and are carried along as they are"
    return "the network does not use it on the example"


def _outside(found: Analysis, scope: str) -> Analysis:
    """What was found in a submodule, by the names of the whole network."""
    sites = tuple(
        replace(
            site,
            name=f"{scope}.{site.name}",
            slots=tuple(replace(slot, tensor=f"{scope}.{slot.tensor}") for slot in site.slots),
            settings=tuple(
                replace(setting, module=f"{scope}.{setting.module}".rstrip(".")) for setting in site.settings
            ),
        )
        for site in found.sites
    )
    return Analysis(sites, tuple(replace(item, layer=f"{scope}.{item.layer}") for item in found.left_out))


def _candidates(channels: Channels) -> tuple[tuple[Site, ...], list[LeftOut]]:
    """Group channels that lie in the same dimensions of the same tensors into sites."""
    left_out: list[LeftOut] = []
    open_channels = np.ones(int(channels.channel.max(initial=-1)) + 1, dtype=bool)
    open_channels[list(channels.reason)] = False
    # Channels of one site have the same occurrences, and so the same sum of random numbers, one a dimension.
    marks = np.random.default_rng(0).integers(1 << 63, size=len(channels.owners), dtype=np.uint64)
    signature = np.zeros(len(open_channels), dtype=np.uint64)
    for owner, mark in zip(channels.owners, marks, strict=True):
        np.add.at(signature, channels.of(owner), mark)
    occurrences: dict[int, list[Owner]] = {}
    for owner in channels.owners:
        along = channels.of(owner)
        for group in np.unique(signature[along[open_channels[along]]]):
            occurrences.setdefault(int(group), []).append(owner)
    sites: list[Site] = []
    names: set[str] = set()
    for owner in channels.owners:
        if channels.roles.get((owner.tensor, owner.dim)) is not Role.INCOMING:
            continue
        along = channels.of(owner)
        for reason, count in _reasons(channels, along):
            left_out.append(LeftOut(owner.tensor, count, reason))
        free = along[open_channels[along]]
        _, first = np.unique(signature[free], return_index=True)
        for group in signature[free][np.sort(first)]:
            where = occurrences.pop(int(group), None)
            if where is None:
                continue  # found at an earlier layer that makes the same channels
            members = list(dict.fromkeys(int(c) for c in free[signature[free] == group]))
            site = _site(channels, owner, members, where, names)
            if isinstance(site, str):
                made = [o for o in where if channels.roles.get((o.tensor, o.dim)) is Role.INCOMING]
                left_out += [
                    LeftOut(o.tensor, int(np.isin(channels.of(o), members).sum()), site) for o in made
                ]
            else:
                names.add(site.name)
                sites.append(site)
    return tuple(sites), left_out


def _reasons(channels: Channels, along: NDArray[np.int32]) -> Iterator[tuple[str, int]]:
    counts: dict[str, int] = {}
    for channel in along:
        if reason := channels.reason.get(int(channel)):
            counts[reason] = counts.get(reason, 0) + 1
    yield from counts.items()


def _site(
    channels: Channels, maker: Owner, members: list[int], where: list[Owner], taken: set[str]
) -> Site | str:
    """Make a site of channels, or say why they are none."""
    slots: list[Slot] = []
    order = np.full(int(channels.channel.max()) + 1, -1)
    order[members] = np.arange(len(members))
    for owner in where:
        role = channels.roles.get((owner.tensor, owner.dim)) or _role_of_vector(channels, owner)
        if role is None:
            return f"what dimension {owner.dim} of {owner.tensor} does with it is not known"
        found = _slots(order, channels.of(owner), owner, role)
        if found is None:
            return f"its channels are not in one order in dimension {owner.dim} of {owner.tensor}"
        slots += found
    roles = {slot.role for slot in slots}
    if Role.OUTGOING not in roles:
        lost = bool(channels.contracted.intersection(members))
        return "only what the network computes carries it on" if lost else "no later layer uses it"
    name = maker.tensor.removesuffix(".weight")
    first = next(slot for slot in slots if slot.tensor == maker.tensor and slot.dim == maker.dim)
    if name in taken or (len(members) * first.block < maker.size and first.start):
        name += f"[{first.start}]"
    return Site(
        name,
        len(members),
        tuple(slots),
        stream=bool(channels.stream.intersection(members)),
        contracted=bool(channels.contracted.intersection(members)),
    )


def _role_of_vector(channels: Channels, owner: Owner) -> Role | None:
    """The role of a vector that met the network only after some arithmetic, as in a frozen BatchNorm."""
    if any(other.size > 1 for other in channels.owners if other.tensor == owner.tensor and other != owner):
        return None
    endings = {"running_mean": Role.MEAN, "running_var": Role.VARIANCE}
    return endings.get(owner.tensor.rpartition(".")[2], Role.SCALE)


def _slots(order: NDArray[np.int64], along: NDArray[np.int32], owner: Owner, role: Role) -> list[Slot] | None:
    """Where a site's channels lie along a dimension: runs of all of them, in order, each in equal blocks.

    Args:
        order: Place of each channel of the network in the site; -1 for those of others, ``(channels,)``.
        along: Channels along the dimension, ``(size,)``.
        owner: The dimension.
        role: What its entries do.
    """
    index = order[along]
    entries = np.flatnonzero(index >= 0)
    sequence = index[entries]
    width = int(sequence.max()) + 1
    if width == 1 and len(sequence) > 1:
        return None  # a block and several runs of a single channel look alike
    block = int(np.argmax(sequence != 0)) or len(sequence)
    run = width * block
    if len(sequence) % run or (sequence.reshape(-1, width, block) != np.arange(width)[:, None]).any():
        return None
    starts = entries[::run]
    if (entries.reshape(-1, run) != starts[:, None] + np.arange(run)).any():
        return None
    return [Slot(owner.tensor, owner.dim, role, int(start), block) for start in starts]
