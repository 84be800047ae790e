"""Re-estimating BatchNorm statistics: most of the damage of confusion channels is a shift of these."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepenc.analysis.batchnorm import batchnorms, reestimate
from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.threat import Needs


class Recalibrate(Attack):
    """Re-estimate all BatchNorm running statistics on unlabelled images; remove nothing.

    Where there is no BatchNorm with such statistics, there is nothing to do.
    """

    name: ClassVar[str] = "recalibrate"
    detects: ClassVar[Weakness | None] = "statistics"

    images: int = Field(32, ge=2)
    """Unlabelled images to use."""

    @property
    def needs(self) -> Needs:
        """The images."""
        return Needs(unlabelled=self.images)

    def pointless(self, case: Case) -> str | None:
        """See `Attack.pointless`."""
        return None if batchnorms(case.encrypted) else "the network has no BatchNorm with running statistics"

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        network = case.copy()
        reestimate(network, case.unlabelled[: self.images].inputs)
        return Claim(network=network)
