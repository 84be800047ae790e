"""Statistics of every channel from the weights alone: a table a site, so that a detector is ten lines.

``standardised(features(named_tensors(network), sites, ["roughness_in"])["conv1"])`` tells how unusually rough
the kernels of each channel of a site are.
"""

from deepenc.analysis.features.parts import Part, Side, SiteChannels
from deepenc.analysis.features.table import (
    CHANNELS,
    NAMES,
    SIDES,
    Table,
    features,
    robust,
    standardised,
)

__all__ = [
    "CHANNELS",
    "NAMES",
    "SIDES",
    "Part",
    "Side",
    "SiteChannels",
    "Table",
    "features",
    "robust",
    "standardised",
]
