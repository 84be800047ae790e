"""Channels whose parts do not belong together."""

from __future__ import annotations

from typing import ClassVar

from deepenc.analysis.features import features, standardised
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.network.structure import named_tensors

RELATIONS = ("out_given_scale", "out_given_in", "variance_given_in")


class Coupling(Attack):
    """Suspect channels whose norms, normalisation factor and running variance do not go together.

    In a trained network the outgoing norm goes with the normalisation's factor and with the incoming norm,
    and the running variance with the square of the incoming norm; parts that were drawn one by one do not.
    A channel's score is the sum of its robust z-scores, by absolute value, of what these relations leave.
    Needs no data.
    """

    name: ClassVar[str] = "coupling"
    detects: ClassVar[Weakness | None] = "statistics"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        tables = features(named_tensors(case.encrypted), case.sites, RELATIONS)
        return Claim(
            scores={
                # Of what weight decay left of a dead channel no relation holds, and it does no harm either.
                name: standardised(table).abs().sum(dim=1) * table.alive
                for name, table in tables.items()
            }
        )
