"""What the public network says that a victim was fine-tuned from."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepenc.analysis.matching import match, sites_before
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.network.structure import named_tensors


class PublicCheckpoint(Attack):
    """Match the channels to those of the public network the victim was fine-tuned from; suspect the rest.

    Channels are matched one to one by the directions of their incoming and outgoing weights (Hungarian
    method), so that neither a permutation nor positive factors hide them. What finds no partner is the key;
    below these, a channel is the more suspect the less it is like its partner. Needs no data, and no
    allocation: the public network's widths tell it.
    """

    name: ClassVar[str] = "public-checkpoint"

    rounds: int = Field(3, ge=1)
    """Passes over the network; from the second on, weights to later sites are compared too."""

    @property
    def needs(self) -> Needs:
        """The public network."""
        return Needs(public_checkpoint=True)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        if case.public is None:
            raise ClaimError("public-checkpoint needs `public_checkpoint: true`, and a victim that has one")
        tensors, public = named_tensors(case.encrypted), named_tensors(case.public)
        sites = sites_before(case.sites, tensors, public)
        if sites is None:
            raise ClaimError(
                "public-checkpoint: the public network's tensors are not those of the encrypted network "
                "without some channels; expected the network that the victim was fine-tuned from"
            )
        found = match(tensors, case.sites, public, sites, rounds=self.rounds)
        return Claim(scores={name: matched.strangeness() for name, matched in found.items()})
