"""The paper's own defenses: the same number of channels at every site, filled in its three ways.

The paper puts the same absolute number at every site (its choice among placements) and speaks of 5 %.
"""

from __future__ import annotations

from deepenc.encryption.defense import Defense
from defenses.placement.absolute import Absolute
from defenses.weights.init import Init
from defenses.weights.mixed import Mixed
from defenses.weights.samp import Samp

samp = Defense(
    name="paper-samp",
    summary="The paper's: as many channels at every site (5 %), entries drawn from the layer's own.",
    placement=Absolute(proportion=0.05),
    weights=Samp(),
)
init = Defense(
    name="paper-init",
    summary="The paper's: as many channels at every site (5 %), Kaiming initialisation.",
    placement=Absolute(proportion=0.05),
    weights=Init(),
)
mixed = Defense(
    name="paper-mixed",
    summary="The paper's: as many channels at every site (5 %), each neuron samp or init by a coin.",
    placement=Absolute(proportion=0.05),
    weights=Mixed(),
)
