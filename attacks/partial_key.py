"""What a part of the key is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs

Channels = Mapping[str, tuple[int, ...]]


class PartialKey(Attack):
    """Remove the confusion channels that leaked, and treat the rest as told.

    With the whole key nothing is left to treat, and the original comes out.
    """

    name: ClassVar[str] = "partial-key"

    rest: Literal["keep", "random"] = "keep"
    """What happens to the channels that did not leak: all stay, or as many as are still missing are removed
    at random."""
    then: Attack | None = Field(None)
    """Another attack, which gets the network without the channels that leaked."""

    @model_validator(mode="after")
    def _one_treatment(self) -> Self:
        if self.then is not None and self.rest != "keep":
            raise ValueError("`then` hands the rest to another attack: leave `rest` at 'keep'")
        return self

    @property
    def needs(self) -> Needs:
        """Some of the key, and what the rest of the attack needs."""
        own = Needs(key_fraction=1e-6, allocation=self.rest == "random")
        return own if self.then is None else own.union(self.then.needs)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        if self.then is not None:
            return restored(case, self.then.attack(case.without(case.known)))
        gone = with_guesses(case) if self.rest == "random" else dict(case.known)
        scores = {site.name: torch.zeros(site.width) for site in case.sites}
        for channels, score in ((gone, 1.0), (case.known, 2.0)):
            for name, positions in channels.items():
                scores[name][list(positions)] = score
        return Claim(scores=scores, network=case.remove(gone))


def with_guesses(case: Case) -> dict[str, tuple[int, ...]]:
    """The positions that leaked, and at each site as many random others as are missing.

    Raises:
        ClaimError: The threat model withholds how many there are.
    """
    generator, counts = case.generator(), case.counts()
    channels = {}
    for site in case.sites:
        known = case.known.get(site.name, ())
        others = torch.tensor([c for c in range(site.width) if c not in set(known)])
        missing = counts.get(site.name, 0) - len(known)
        guessed = others[torch.randperm(len(others), generator=generator)[:missing]]
        channels[site.name] = tuple(sorted([*known, *guessed.tolist()]))
    return {name: chosen for name, chosen in channels.items() if chosen}


def restored(case: Case, claim: Claim) -> Claim:
    """A claim about the smaller case as one about the whole, the channels that leaked the most suspect."""
    found: Mapping[str, Tensor] = claim.scores or {}
    top = max((float(s.max()) for s in found.values()), default=0.0) + 1.0
    bottom = min((float(s.min()) for s in found.values()), default=0.0)
    scores = {}
    for site in case.sites:
        left = torch.ones(site.width, dtype=torch.bool)
        left[list(case.known.get(site.name, ()))] = False
        scores[site.name] = torch.full((site.width,), top, dtype=torch.float64)
        scores[site.name][left] = found[site.name].double().cpu() if site.name in found else bottom
    network = claim.network
    if network is None and case.allocation is None:
        network = case.remove(case.known)
    return Claim(scores=scores, network=network, diverged=claim.diverged)
