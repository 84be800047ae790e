"""The paper's P = p^L, measured: how often each site's key is found, alone and all together.

The paper reckons that a network of L layers is decrypted with probability P = p^L, where each layer's key is
found with probability p, independently (Section 4), and asks what a nearly right key is worth. The first is
looked at here; the second in a curve of `partial-key` over the fraction of the key.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deepenc.arena.record import Detection


@dataclass(frozen=True)
class Layers:
    """How often sites were found exactly, over several keys of one network.

    Attributes:
        mean: Mean share of the sites found; the paper's p.
        product: What P would be if sites were found independently: the product of each site's share of keys
            for which it was found, 0 where a site was never found.
        joint: Share of the keys for which all sites were found: what P was.
    """

    mean: float
    product: float
    joint: float


def per_layer(detections: Sequence[Detection]) -> Layers:
    """Success by site.

    Args:
        detections: One for each key, at least one, all of the same sites.
    """
    keys, sites = len(detections), detections[0].sites
    found = Counter(name for detection in detections for name in detection.found)
    missed = len(found) < sites
    return Layers(
        mean=sum(found.values()) / (keys * sites),
        product=0.0 if missed else math.prod(count / keys for count in found.values()),
        joint=sum(len(detection.found) == sites for detection in detections) / keys,
    )
