"""The attack that does nothing."""

from __future__ import annotations

from typing import ClassVar, Literal

from deepenc.arena.case import Attack, Case, Claim


class Null(Attack):
    """Use the encrypted network as it is."""

    name: ClassVar[str] = "null"
    reference: ClassVar[Literal["floor", "scratch"] | None] = "floor"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        return Claim(network=case.encrypted)
