"""Several attacks, one after the other, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.metrics import checked_scores, most_suspect
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.plugins import build


class Chain(Attack):
    """Run several attacks one after the other, each on what the one before it left, on one budget.

    After a stage that claims only scores, the most suspect channels are removed; where a stage claims a
    network, the next one gets that network. The chain claims the last network, and the first scores.
    """

    name: ClassVar[str] = "chain"

    stages: tuple[Attack, ...] = Field(
        default_factory=lambda: tuple(build("attack", name) for name in ("norms", "finetune")), min_length=1
    )
    """The attacks, in order."""
    excess: float = Field(1.0, ge=1)
    """Channels to remove, in multiples of a site's ΔC: above 1, real ones are lost so that
    hardly any confusion channel is left."""
    fraction: float = Field(0.05, gt=0, lt=1)
    """Share of each site's channels to remove where the threat model withholds ΔC."""

    @property
    def needs(self) -> Needs:
        """What all stages need."""
        return reduce(Needs.union, (stage.needs for stage in self.stages))

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        scores: Mapping[str, Tensor] | None = None
        left, diverged = case, False
        for stage in self.stages:
            claim = stage.attack(left)
            diverged = diverged or claim.diverged
            # The first scores number the whole network's channels: nothing is removed before them.
            scores = claim.scores if scores is None else scores
            if claim.network is not None:
                left = around(left, claim.network)
            elif claim.scores is not None:
                left = self._removed(left, claim.scores, f"chain: {stage.name}")
            else:
                raise ClaimError(f"chain: {stage.name!r} claims neither scores nor a network")
        return Claim(scores=scores, network=left.encrypted, diverged=diverged)

    def _removed(self, case: Case, scores: Mapping[str, Tensor], who: str) -> Case:
        counts = {site.name: self._count(case, site) for site in case.sites}
        suspects = most_suspect(checked_scores(scores, case.sites, who), counts)
        return case.without({name: channels for name, channels in suspects.items() if channels})

    def _count(self, case: Case, site: Site) -> int:
        """Channels to remove of a site; at least one stays."""
        known = case.allocation
        wanted = self.fraction * site.width if known is None else self.excess * known.get(site.name, 0)
        # Half up; a share is of something, so that it removes at least one.
        count = max(int(wanted + 0.5), int(known is None))
        return min(count, site.width - 1)


def around(case: Case, network: nn.Module) -> Case:
    """The case with another network; without sites where the network's tensors no longer fit them."""
    network = network.eval()
    if fits(network, case.encrypted, case.sites):
        return case.with_network(network)
    return replace(case.with_network(network), sites=(), known={}, allocation=case.allocation and {})


def fits(network: nn.Module, encrypted: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether a network's tensors have, wherever sites lie, the shapes of the encrypted network's."""
    new, old = named_tensors(network), named_tensors(encrypted)
    tensors = {slot.tensor for site in sites for slot in site.slots}
    return all(name in new and new[name].shape == old[name].shape for name in tensors)
