"""What the stored tensors give away besides their values as numbers: precision, redundancy, weak seeds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from deepenc.analysis.storage import among, bits, hidden, shared_bits, subnormal, trailing_zeros
from deepenc.arena.case import Attack, Case, Claim
from deepenc.encryption.defense import Defense, Neurons
from deepenc.encryption.keys.secret import derive_positions, secret_of
from deepenc.encryption.shelter import derived
from deepenc.errors import DeepencError
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, Positions, narrow, narrow_sites

KINDS = ({Role.INCOMING}, {Role.OUTGOING}, set(Role) - {Role.INCOMING, Role.OUTGOING})
NORMAL = 1.4826  # makes the median absolute deviation of a normal distribution its standard deviation
ALONE = 10.0


class Container(Attack):
    """Suspect channels that were stored otherwise than the rest: rounded, compressible, of a weak seed.

    A channel's score is the sum of the squares of its robust z-scores: trailing zero bits of its
    mantissas, exact zeros, subnormal numbers, how well its bytes compress, values that occur in other
    tensors too, gradients, and values that lie about in a tensor's storage. Then, where the allocation
    is known, small seeds of `deepenc.encrypt` are tried, each for a trial of the budget: one is right if
    it makes the confusion weights again. Against weights of full precision, and secrets of 32 random
    bytes, nothing of this helps.
    """

    name: ClassVar[str] = "container"

    seeds: int = Field(256, ge=0)
    """Seeds to try, from 0; no more than the threat model's trials."""
    prefix: int = Field(4096, ge=1)
    """Bytes of each channel's weights that are compressed."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tensors = named_tensors(case.encrypted)
        used = {slot.tensor for site in case.sites for slot in site.slots}
        shared = shared_bits(tensors[name] for name in sorted(used))
        scores = {}
        for site in case.sites:
            seen = [unusual(tell).square() for tell in self._tells(tensors, site, shared)]
            scores[site.name] = torch.stack(seen).sum(0)
        for name, positions in self._guess(case, tensors).items():
            scores[name][list(positions)] += 1 + scores[name].max()
        return Claim(scores=scores)

    def _tells(self, tensors: Mapping[str, Tensor], site: Site, shared: Tensor) -> Iterator[Tensor]:
        """Per channel, ``(width,)``: each of what may give it away."""
        for roles in KINDS:
            slots = [slot for slot in site.slots if slot.role in roles]
            rows = [slot.rows(tensors[slot.tensor].detach(), site.width).cpu() for slot in slots]
            if rows:
                yield mean([trailing_zeros(r) for r in rows])
                yield mean([r == 0 for r in rows])
                yield mean([subnormal(r) for r in rows])
                yield mean([among(r, shared) for r in rows])
                yield self._compressed(rows)
        for slot in site.slots:
            yield from leftovers(tensors[slot.tensor], slot, site.width)

    def _compressed(self, rows: list[Tensor]) -> Tensor:
        """Length after compression, per byte."""
        parts = [bits(r).numpy() for r in rows]
        stored = [b"".join(part[c].tobytes() for part in parts)[: self.prefix] for c in range(len(rows[0]))]
        lengths = [len(zlib.compress(row)) / len(row) for row in stored]
        return torch.tensor(lengths, dtype=torch.float64)

    def _guess(self, case: Case, tensors: Mapping[str, Tensor]) -> Positions:
        """The positions of the first seed that makes the confusion weights; empty if none does."""
        counts = {name: count for name, count in (case.allocation or {}).items() if count}
        try:
            weights = Defense.model_validate(case.defense).weights
        except (DeepencError, ValidationError):
            return {}  # its code is not at hand
        if weights is None or not counts:
            return {}
        originals = narrow_sites(case.sites, {name: tuple(range(count)) for name, count in counts.items()})
        site = min((s for s in originals if s.name in counts), key=lambda s: s.width)
        left = case.meter.left("trials")
        for seed in range(self.seeds if left is None else min(self.seeds, left)):
            case.meter.charge(trials=1)
            secret = secret_of(seed=seed)
            guess = derive_positions(secret, originals, counts)
            layout = Layout(originals, guess)
            neurons, held = opened(tensors, layout, site)
            made = derived(weights, neurons, secret)
            # Hardening may have changed some of them, a later site others.
            equal = torch.cat([(a == b).flatten() for a, b in zip(made, held, strict=True)])
            if equal.double().mean() > 0.5:
                return guess
        return {}


def opened(tensors: Mapping[str, Tensor], layout: Layout, site: Site) -> tuple[Neurons, list[Tensor]]:
    """A site's confusion channels before they were filled, if the layout is right, and what is in them."""
    own = {slot.tensor: tensors[slot.tensor].detach().cpu() for slot in site.slots}
    held = [
        own[slot.tensor].index_select(slot.dim, layout.confusion_entries(site, slot)) for slot in site.slots
    ]
    victim = {
        name: narrow(tensor, layout.kept(name, layout.narrowed_shape(name, tensor.shape)))
        for name, tensor in own.items()
    }
    return Neurons.of(site, layout, victim), held


def unusual(values: Tensor) -> Tensor:
    """Absolute robust z-scores; where most values are equal, any other one stands out, the furthest by 10."""
    away = (values.double() - values.double().median()).abs()
    spread = NORMAL * away.median() if away.median() > 0 else away.max() / ALONE
    return away / spread.clamp_min(torch.finfo(torch.float64).tiny)


def mean(rows: list[Tensor]) -> Tensor:
    """Mean over all entries of each channel, ``(width,)``, float64."""
    return torch.cat([r.double() for r in rows], dim=1).mean(dim=1)


def leftovers(tensor: Tensor, slot: Slot, width: int) -> Iterator[Tensor]:
    """What hangs on a tensor, per channel: gradients, and values that its storage has a second time."""
    if tensor.grad is not None:
        yield slot.rows(tensor.grad.abs(), width).double().mean(dim=1).cpu()
    if len(unseen := hidden(tensor)):
        again = torch.isin(tensor.detach().cpu(), unseen)
        yield slot.rows(again, width).double().mean(dim=1)
