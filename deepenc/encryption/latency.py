"""What allocations cost in time, here and now.

One network widened at one site is seldom slower by more than noise. So many networks are timed, in each of
which about half of the sites are widened, after a spring-balance weighing design (Hotelling 1944): every
site's price is a difference between two halves of all measurements. Contrasts that belong to no site show
how much of it is noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from deepenc.encryption.costs import Quadratic, Sizes, images_of, widened_by
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.calling import call
from deepenc.network.structure import named_tensors

MILLISECOND = 10**6
"""In nanoseconds."""
REPEATS = (3, 30)
"""Times that each network is timed in a round, at least and at most; between, as often as takes `SPENT`. The
fastest counts, for nothing makes a network faster than it is."""
SPENT = 10**8
"""Nanoseconds."""
ROUNDS = 4
"""Rounds at most, where one does not tell channels from noise."""
STEP = 0.25
"""Part of its width by which a site is widened to see what that takes."""
LEAST = 0.1
"""A site's price is at least this part of what its memory lets one expect: noise makes nothing free."""
CERTAIN = 3
"""Standard errors above zero, at least, that all sites' channels must take together."""

FREE = 4
"""Columns of the design, at least, that are no site's, and show the noise."""

Timed = Callable[[nn.Module, Any], int]
"""Nanoseconds that a network takes for an example."""


def latency(original: Original, timed: Timed | None = None) -> Quadratic:
    """Nanoseconds of one input: a number for each channel of a site.

    What channels of two sites cost each other is averaged in. The prices are estimates, of this machine as
    busy as it is, and others each time; those of single sites are much less certain than their sum.

    Args:
        original: The victim.
        timed: A clock; default: `timed_once`.

    Raises:
        ConfigError: Networks with more channels are not slower by more than noise.
    """
    more = {site.name: max(1, int(STEP * site.width)) for site in original.sites}
    weighing = _Weighing(original, more, timed or timed_once)
    for _ in range(ROUNDS):
        weighing.measure()
        effects, error = weighing.effects()
        together = sum(effects.values())
        if together > CERTAIN * error:
            break
    else:
        raise ConfigError(
            f"{type(original.model).__name__}, {STEP:.0%} wider, is slower by {together:.0f} ± {error:.0f} "
            "nanoseconds, which is not more than noise; give the budget in operations ({flops: 5%}), or "
            "measure on an idle machine, with an example of more images"
        )
    sizes, images = Sizes(original, entries=False), images_of(original.example)
    expected = {name: sizes.price({}, name, n) for name, n in more.items()}
    share = LEAST * together / sum(expected.values())
    kept = {name: max(effect, share * expected[name]) for name, effect in effects.items()}
    scale = together / sum(kept.values())
    single = {name: max(1, round(scale * kept[name] / (n * images))) for name, n in more.items()}
    return Quadratic(weighing.total // images, single)


class _Weighing:
    """Networks in which sites are widened by turns, and what they took so far.

    Args:
        original: The victim.
        more: Site name to the channels by which it is widened.
        timed: A clock.

    Attributes:
        total: Nanoseconds that the victim takes for the example.
    """

    def __init__(self, original: Original, more: Mapping[str, int], timed: Timed) -> None:
        self._original, self._more, self._timed = original, more, timed
        self._rows = 1 << (len(more) + FREE).bit_length()
        # Where two sites cost each other something it falls on a third column; so on any, not the same.
        columns = np.random.default_rng(0).permutation(np.arange(1, self._rows)).tolist()
        self._columns = dict(zip(more, columns, strict=False))
        self._free = columns[len(more) :]
        self._times: list[list[tuple[int, int]]] = [[] for _ in range(self._rows)]
        timed(original.model, original.example)  # the first is slower
        usual = min(timed(original.model, original.example) for _ in range(REPEATS[0]))
        self._repeats = min(max(REPEATS[0], SPENT // max(1, usual)), REPEATS[1])

    def measure(self) -> None:
        """One more round: each network in turn with the victim, as a machine that gets busier slows both."""
        model, example = self._original.model, self._original.example
        for row in range(self._rows):  # the first is a copy and no more, to see what that takes
            allocation = {name: n for name, n in self._more.items() if _joins(row, self._columns[name])}
            network = widened_by(model, self._original.sites, allocation)
            self._times[row] += [
                (self._timed(model, example), self._timed(network, example)) for _ in range(self._repeats)
            ]
        self.total = min(before for times in self._times for before, _ in times)

    def effects(self) -> tuple[dict[str, float], float]:
        """What each site's channels take, in nanoseconds, and the standard error of their sum."""
        slower = [
            min(after for _, after in times) - min(before for before, _ in times) for times in self._times
        ]

        def contrast(column: int) -> float:
            return 2 / self._rows * sum(d if _joins(row, column) else -d for row, d in enumerate(slower))

        found = {name: contrast(column) for name, column in self._columns.items()}
        noise = sum(contrast(column) ** 2 for column in self._free) / len(self._free)
        return found, math.sqrt(len(found) * noise)


def _joins(row: int, column: int) -> bool:
    """Whether a network widens a site: half of them each site, a quarter of them any two."""
    return (row & column).bit_count() % 2 == 1


def timed_once(network: nn.Module, example: Any) -> int:
    """Nanoseconds of one run, the device's work included."""
    device = next((t.device for t in named_tensors(network).values()), torch.device("cpu"))

    def finished() -> int:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter_ns()

    started = finished()
    with torch.no_grad():
        call(network, example)
    return finished() - started
