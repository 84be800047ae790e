"""The feature table and the detectors that read it, beside a plain loop over neurons.

On the CIFAR ResNet-20 and torchvision's ResNet-152, VGG-16 and ViT-B/16 with random weights, encrypted by
`paper-samp`: CPU seconds on one core and peak memory above the loaded network, of the whole table, of each
group of statistics, and of each detector from weights alone, each in a process of its own.

The loop computes the same numbers neuron by neuron with numpy, scipy and scikit-learn, one call each
(tests/analysis/plain_features.py, to which a test holds the table). It takes a few channels of one site of
each shape, and its time is extrapolated to all channels of all sites. What need not be done for each channel
again, such as to sort a slot, it does once a site. It reads rows that are already laid out, and of very large
slots the same part that the table looks at; neither counts against it.

    python -m benchmarks.detectors [--networks resnet20 resnet152 vgg16 vit_b_16] [--channels 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from deepenc.analysis.features import CHANNELS, NAMES, SIDES, features
from deepenc.arena.case import Attack
from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import encrypt
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.plugins import build
from deepenc.victims.models import CifarResNet
from tests.analysis.plain_features import Plain

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
        encrypted=encrypted, sites=sites, allocation=dict(key.allocation), seed=0, device="cpu"
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
