"""The paper's P = p^L, measured: how often each site's key is found, alone and all together.

The paper reckons that a network of L layers is decrypted with probability P = p^L, where each layer's key is
found with probability p, independently (Section 4), and asks what a nearly right key is worth. The first is
looked at here; the second in a curve of `partial-key` over the fraction of the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deepenc.arena.metrics import Scores
from deepenc.network.sites import Site


@dataclass(frozen=True)
class Layers:
    """How often sites were found exactly, over several keys of one network.

    Attributes:
        keys: Number of keys.
        sites: Sites with confusion channels, the paper's L.
        rates: Site name to the share of the keys for which it was found, in [0, 1]; the paper's p.
        product: What P would be if sites were found independently: the product of the rates, 0 where a site
            was never found.
        joint: Share of the keys for which all sites were found: what P was.
        mean: Mean share of the sites found.
    """

    keys: int
    sites: int
    rates: Mapping[str, float]
    product: float
    joint: float
    mean: float


def site_success(
    scores: Scores, sites: Sequence[Site], positions: Mapping[str, Sequence[int]]
) -> dict[str, bool]:
    """Which sites' ΔC most suspect channels are exactly the confusion channels.

    A tie between a confusion channel and a real one is no success; a site without scores is all ties.

    Args:
        scores: From `deepenc.arena.metrics.checked_scores`.
        sites: Sites of the encrypted network.
        positions: Confusion positions per site; sites without any are left out of the result.
    """
    success = {}
    for site in sites:
        if chosen := list(positions.get(site.name, ())):
            forged = np.zeros(site.width, dtype=bool)
            forged[chosen] = True
            values = scores.get(site.name, np.zeros(site.width))
            success[site.name] = bool(values[forged].min() > values[~forged].max())
    return success


def per_layer(successes: Sequence[Mapping[str, bool]]) -> Layers:
    """Success by site over several keys.

    Args:
        successes: One for each key, from `site_success`; at least one, all of the same sites, at least one.

    Raises:
        ValueError: There are none, or they are of different sites.
    """
    names = list(successes[0]) if successes else []
    if not names or any(set(one) != set(names) for one in successes):
        raise ValueError("expected successes of the same sites, of one site and one key at least")
    rates = {name: sum(one[name] for one in successes) / len(successes) for name in names}
    return Layers(
        keys=len(successes),
        sites=len(names),
        rates=rates,
        product=math.prod(rates.values()),
        joint=sum(all(one.values()) for one in successes) / len(successes),
        mean=sum(rates.values()) / len(names),
    )
