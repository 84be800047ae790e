"""The statistics of channels one by one, with numpy, scipy and scikit-learn: slow, and plain to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from deepenc.analysis.features import SIDES, SiteChannels
from deepenc.analysis.features.relations import PAIRS
from deepenc.network.sites import Role, Site

Values = NDArray[np.float64]


@dataclass(eq=False)
class PlainSlot:
    """One slot, ``(width, partners, block, *kernel)``, and what need not be done for each channel again."""

    values: Values

    @cached_property
    def ascending(self) -> Values:
        """All entries, sorted."""
        return np.sort(self.values, axis=None)

    @cached_property
    def energies(self) -> list[Values]:
        """Mean squares by partner, channel by channel."""
        return [np.mean(row.reshape(row.shape[0], -1) ** 2, axis=1) for row in self.values]


@dataclass(eq=False)
class PlainSide:
    """All slots of one side."""

    slots: list[PlainSlot]

    @cached_property
    def rows(self) -> Values:
        """The slots side by side."""
        return np.concatenate([slot.values.reshape(len(slot.values), -1) for slot in self.slots], axis=1)

    @cached_property
    def directions(self) -> Values:
        """Rows of norm 1."""
        return self.rows / np.linalg.norm(self.rows, axis=1, keepdims=True)


def averaged(of: Callable[[PlainSlot, int], float | None]) -> Callable[[PlainSide, int], float | None]:
    """A statistic of one slot, averaged over the slots by their entries."""

    def statistic(side: PlainSide, channel: int) -> float | None:
        found = [(of(slot, channel), slot.values[0].size) for slot in side.slots]
        kept = [(value, size) for value, size in found if value is not None]
        values, sizes = zip(*kept, strict=True) if kept else ((), ())
        return float(np.average(values, weights=sizes)) if kept else None

    return statistic


def anderson_darling(slot: PlainSlot, channel: int) -> float:
    """Log of Anderson and Darling's A² of a row, with the distribution of the slot for the reference."""
    pool, row = slot.ascending, np.sort(slot.values[channel], axis=None)
    below, upto = np.searchsorted(pool, row, "left"), np.searchsorted(pool, row, "right")
    share = (below + upto) / 2 / pool.size
    weights = 2 * np.arange(1, row.size + 1) - 1
    return float(np.log(-row.size - np.mean(weights * (np.log(share) + np.log(1 - share[::-1])))))


def roughness(slot: PlainSlot, channel: int) -> float | None:
    """Minus the products of adjacent taps, over the energy."""
    kernels = slot.values[channel]
    axes = [axis for axis in range(2, kernels.ndim) if kernels.shape[axis] > 1]
    if not axes:
        return None
    products = 0.0
    for axis in axes:
        ahead, behind = np.delete(kernels, 0, axis), np.delete(kernels, -1, axis)
        products += float((ahead * behind).sum())
    return -products / float((kernels**2).sum())


def profile(slot: PlainSlot, channel: int) -> float | None:
    """Log-likelihood of the row per weight, scales of the other rows for the partners against none."""
    width, partners = slot.values.shape[:2]
    if partners < 2 or width < 3:
        return None
    others = [energy / energy.mean() for index, energy in enumerate(slot.energies) if index != channel]
    scales = np.mean(others, axis=0) + 1e-6
    row = slot.values[channel].reshape(partners, -1)
    deviation = np.sqrt(np.mean(slot.energies[channel] / scales) * scales)[:, None]
    with_profile = stats.norm.logpdf(row, scale=deviation).mean()
    return float(with_profile - stats.norm.logpdf(row, scale=np.sqrt(np.mean(row**2))).mean())


def subspace(side: PlainSide, channel: int) -> float:
    """Share of a row in the others' singular directions, each weighed by e / (e + λ)."""
    rows = side.directions
    _, values, vectors = np.linalg.svd(np.delete(rows, channel, axis=0), full_matrices=False)
    energies = values**2
    ridge = len(rows) / min(rows.shape)
    return float(((vectors @ rows[channel]) ** 2 * energies / (energies + ridge)).sum())


def cosine(side: PlainSide, channel: int) -> float | None:
    """Largest absolute cosine with another row."""
    if len(side.rows) < 2:
        return None
    own = cosine_similarity(side.rows[channel : channel + 1], side.rows)
    return float(np.abs(np.delete(own, channel)).max())


PLAIN: Mapping[str, Callable[[PlainSide, int], float | None]] = {
    "mean": averaged(lambda slot, channel: float(slot.values[channel].mean())),
    "deviation": averaged(lambda slot, channel: float(slot.values[channel].std())),
    "skew": averaged(lambda slot, channel: float(stats.skew(slot.values[channel], axis=None))),
    "kurtosis": averaged(lambda slot, channel: float(stats.kurtosis(slot.values[channel], axis=None))),
    "ks": averaged(
        lambda slot, channel: float(
            stats.ks_2samp(slot.values[channel].ravel(), slot.ascending, method="asymp").statistic
        )
    ),
    "ad": averaged(anderson_darling),
    "energy": averaged(
        lambda slot, channel: stats.energy_distance(slot.values[channel].ravel(), slot.ascending)
    ),
    "roughness": averaged(roughness),
    "profile": averaged(profile),
    "subspace": subspace,
    "cosine": cosine,
}
"""Statistics of one side and one channel, as in `deepenc.analysis.features.SIDES`; the norm is below."""


class Plain:
    """The statistics of a site's channels one by one.

    Args:
        tensors: State dict.
        site: The site.
    """

    def __init__(self, tensors: Mapping[str, Tensor], site: Site) -> None:
        self.channels = SiteChannels(tensors, site)
        sides = {"in": self.channels.incoming, "out": self.channels.outgoing}
        self.width = site.width
        self.sides = {
            end: PlainSide([PlainSlot(part.values.double().numpy()) for part in side.parts])
            for end, side in sides.items()
            if side is not None
        }
        self.whole = {
            role: [
                tensors[slot.tensor].detach().double().movedim(slot.dim, 0).numpy()[slot.start :]
                for slot in site.slots
                if slot.role is role
            ]
            for role in Role
        }
        self.blocks = {role: [slot.block for slot in site.slots if slot.role is role] for role in Role}

    def __call__(self, name: str, channel: int) -> float | None:
        """A statistic of `NAMES` for a channel; None where the site has none."""
        base, _, end = name.rpartition("_")
        if base in SIDES and end in ("in", "out"):
            if end not in self.sides:
                return None
            if base == "norm":
                return self.norm(Role.INCOMING if end == "in" else Role.OUTGOING, channel)
            return PLAIN[base](self.sides[end], channel)
        return self.relation(name, channel)

    def entries(self, role: Role, channel: int) -> list[NDArray[np.float64]]:
        """A channel's entries of a role, slot by slot."""
        pairs = zip(self.whole[role], self.blocks[role], strict=True)
        return [rows[channel * block : (channel + 1) * block] for rows, block in pairs]

    def norm(self, role: Role, channel: int) -> float | None:
        """Log norm of all weights."""
        entries = self.entries(role, channel)
        return (
            float(np.log(np.linalg.norm(np.concatenate([e.ravel() for e in entries])))) if entries else None
        )

    def value(self, role: Role, channel: int) -> float | None:
        """Mean of a vector's entries, over the slots."""
        entries = self.entries(role, channel)
        return float(np.mean([entry.mean() for entry in entries])) if entries else None

    def log(self, role: Role, channel: int) -> float | None:
        """Log of its absolute value."""
        value = self.value(role, channel)
        return None if value is None else float(np.log(abs(value)))

    def relation(self, name: str, channel: int) -> float | None:
        """One of `deepenc.analysis.features.CHANNELS`."""
        roles = {"bias": Role.BIAS, "scale": Role.SCALE, "shift": Role.SHIFT, "centre": Role.MEAN}
        if name in roles:
            return self.value(roles[name], channel)
        variance = self.log(Role.VARIANCE, channel)
        incoming, outgoing = (self.norm(role, channel) for role in (Role.INCOMING, Role.OUTGOING))
        if name == "variance":
            return variance
        if name == "variance_given_in":
            return None if variance is None or incoming is None else variance - 2 * incoming
        if name == "balance":
            if incoming is None or outgoing is None:
                return None
            bias = self.value(Role.BIAS, channel) or 0.0
            return float(np.log(np.exp(2 * incoming) + bias**2) - 2 * outgoing)
        residuals = self.residuals(name)
        return None if residuals is None else float(residuals[channel])

    @cache  # noqa: B019
    def residuals(self, name: str) -> Values | None:
        """What a line of Theil and Sen's slope leaves of the outgoing norms."""
        every = range(self.width)
        y = [self.norm(Role.OUTGOING, channel) for channel in every]
        if name == "out_given_scale":
            x = [self.log(Role.SCALE, channel) for channel in every]
        else:
            x = [self.norm(Role.INCOMING, channel) for channel in every]
        if None in x or None in y:
            return None
        kept = np.arange(min(self.width, PAIRS)) * self.width // min(self.width, PAIRS)
        ahead, along = np.array(y, dtype=float), np.array(x, dtype=float)
        slope = stats.theilslopes(ahead[kept], along[kept])[0] if np.ptp(along[kept]) else 0.0
        residuals: Values = ahead - slope * along
        return residuals - np.median(residuals)
