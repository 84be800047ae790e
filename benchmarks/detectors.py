"""The feature table and the detectors that read it, beside a plain loop over neurons.

On the CIFAR ResNet-20 and torchvision's ResNet-152, VGG-16 and ViT-B/16 with random weights, encrypted by
`paper-samp`: CPU seconds on one core and peak memory above the loaded network, of the whole table, of each
group of statistics, and of each detector from weights alone, each in a process of its own.

The loop computes the same numbers neuron by neuron with numpy, scipy and scikit-learn, one call each
(tests/analysis/test_features.py holds the table to it). It takes a few channels of one site of each shape,
and its time is extrapolated to all channels of all sites. What need not be done for each channel again,
such as to sort a slot, it does once a site. It reads rows that are already laid out, and of very large slots
the same part that the table looks at; neither counts against it.

    python benchmarks/detectors.py [--networks resnet20 resnet152 vgg16 vit_b_16] [--channels 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor, nn

from deepenc.analysis.features import CHANNELS, NAMES, SIDES, Channels, features
from deepenc.analysis.features.relations import PAIRS
from deepenc.arena.case import Attack
from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import encrypt
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Site
from deepenc.plugins import build
from deepenc.victims.models import CifarResNet

NETWORKS = ("resnet20", "resnet152", "vgg16", "vit_b_16")
DETECTORS: Mapping[str, tuple[str, ...] | None] = {
    "norms": ("norm",),
    "typical": ("norm",),
    "batchnorm-defaults": None,
    "distribution:statistic=ks": ("ks",),
    "distribution:statistic=ad": ("ad",),
    "distribution:statistic=energy": ("energy",),
    "distribution:statistic=moments": ("mean", "deviation", "skew", "kurtosis"),
    "roughness": ("roughness",),
    "profile": ("profile",),
    "subspace": ("subspace",),
    "alignment": ("cosine",),
    "coupling": ("out_given_scale", "out_given_in", "variance_given_in"),
    "outliers:method=covariance": None,
    "outliers:method=isolation-forest": None,
    "outliers:method=lof": None,
    "outliers:method=svm": None,
    "mixture": None,
}
"""Detectors, and the statistics that the loop does instead; None where most of the work is not ours."""

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
        self.channels = Channels(tensors, site)
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


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and an input."""
    torch.manual_seed(0)
    if name == "resnet20":
        return CifarResNet(20).eval(), torch.randn(1, 3, 32, 32)
    return getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds, and peak MiB above what was there, in a forked process."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def job() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        work()
        seconds = time.process_time() - started
        sending.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))

    process = context.Process(target=job)
    process.start()
    sending.close()
    try:
        return receiving.recv()  # type: ignore[no-any-return]
    except EOFError:
        return float("nan"), float("nan")
    finally:
        process.join()


def plain_seconds(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], channels: int
) -> tuple[dict[str, float], int]:
    """CPU seconds of the loop over all channels of all sites, by statistic; and the channels really done."""
    alike = defaultdict(list)
    for site in sites:
        shapes = tuple((slot.role, slot.block, tensors[slot.tensor].shape) for slot in site.slots)
        alike[site.width, shapes].append(site)
    total: dict[str, float] = defaultdict(float)
    done = 0
    for group in alike.values():
        plain = Plain(tensors, group[0])
        chosen = np.linspace(0, plain.width - 1, min(channels + 1, plain.width)).astype(int)
        done += len(chosen)
        for name in NAMES:
            times = [time.process_time()]
            for channel in chosen:
                plain(name, int(channel))
                times.append(time.process_time())
            first, *others = np.diff(times)  # the first channel's includes what is done once a site
            site_seconds = first + (float(np.mean(others)) * (plain.width - 1) if others else 0.0)
            total[name] += site_seconds * len(group)
    return dict(total), done


def sides(base: str) -> tuple[str, ...]:
    """The columns of a statistic."""
    return (f"{base}_in", f"{base}_out") if base in SIDES else (base,)


def compare(name: str, channels: int, console: Console) -> None:
    """Measure one network and print its table."""
    model, example = network(name)
    sites = find_sites(model, example)
    encrypted, key = encrypt(model, example, Defense.of("paper-samp"), secret=bytes(32), sites=sites)
    sites = list(key.layout().widened_sites())
    tensors = encrypted.state_dict()
    case = SimpleNamespace(
        encrypted=encrypted, sites=sites, configuration=dict(key.configuration), seed=0, device="cpu"
    )
    features(tensors, sites[:1])  # imports and lazy initialisations are nobody's cost
    plain, done = plain_seconds(tensors, sites, channels)
    size = sum(tensor.numel() for tensor in model.parameters()) / 1e6
    width = sum(site.width for site in sites)
    title = f"{name}: {size:.1f} M parameters, {len(sites)} sites, {width} channels; the loop did {done}"
    table = Table(title=title)
    for column in ("what", "CPU s", "MiB", "loop, extrapolated: CPU s", "times faster"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def row(what: str, work: Callable[[], Any], names: Sequence[str]) -> None:
        seconds, peak = measured(work)
        loop = sum(plain[n] for n in names)
        faster = f"{loop / seconds:.0f}" if names and seconds else ""
        table.add_row(what, f"{seconds:.2f}", f"{peak:.0f}", f"{loop:.1f}" if names else "", faster)

    groups = {"the whole table": NAMES, **{base: sides(base) for base in SIDES}, "relations": tuple(CHANNELS)}
    for what, names in groups.items():
        row(what, partial(features, tensors, sites, names), names)
    for spec, read in DETECTORS.items():
        attack = build("attack", spec)
        assert isinstance(attack, Attack)
        row(f"attack {spec}", partial(attack.attack, case), [n for base in read or () for n in sides(base)])
    console.print(table)


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--channels", type=int, default=2, help="channels of each shape that the loop does")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        compare(name, options.channels, Console(width=130))


if __name__ == "__main__":
    main()
