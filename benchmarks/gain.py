"""Candidates of Equation 1 a second: `response.candidates` beside a network built for each.

From an allocation with some channels at every site, the response with one more channel at each of some
sites. The slow path copies the victim, encrypts the copy, and runs both whole on the same images, as
`response_change` does. The fast path draws confusion channels once (its preparation is given apart) and runs
what changes. Random weights; CPU seconds of this process. The error is that of the fast response on the
encrypted network that it stands for. The share is that of an encrypted network's multiplications which a
candidate runs again, as all behind a changed site must be; the slow path runs all of them, and the victim's.

    python benchmarks/gain.py [--networks resnet20 resnet18 vit_b_16 vit_b_16_mlp] [--images 32] [--sites 8]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepenc.encryption.defense import Original
from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.response.candidates import Candidates
from deepenc.encryption.response.objective import response_change
from deepenc.network.find import find_sites
from deepenc.plugins import build
from deepenc.victims.models import CifarResNet

NETWORKS = ("digits", "resnet20", "resnet18", "vit_b_16", "vit_b_16_mlp")
SHARE = 0.05


def network(name: str) -> tuple[nn.Module, tuple[int, ...], str]:
    """A network, the shape of its images, and the sites to widen."""
    if name == "digits":
        return CifarResNet(14, channels=1), (1, 8, 8), "*"
    if name == "resnet20":
        return CifarResNet(20), (3, 32, 32), "*"
    if name == "resnet18":
        return torchvision.models.resnet18(), (3, 64, 64), "*"
    return torchvision.models.vit_b_16(image_size=64), (3, 64, 64), "*.mlp.*" if "mlp" in name else "*"


def measured(name: str, images: int, number: int) -> Sequence[str]:
    """One row of the table."""
    torch.manual_seed(0)
    model, shape, pattern = network(name)
    for parameter in model.parameters():
        if not parameter.any():  # a head that starts with zeros answers with nothing
            nn.init.normal_(parameter, std=0.02)
    model.eval()
    inputs = torch.randn(images, *shape)
    sites = tuple(site for site in find_sites(model, inputs[:1]) if fnmatchcase(site.name, pattern))
    base = {site.name: max(1, int(SHARE * site.width)) for site in sites}
    chosen = [sites[i].name for i in np.linspace(0, len(sites) - 1, min(number, len(sites))).astype(int)]
    asked = [{**base, name: base[name] + 1} for name in chosen]

    slow = 0.0
    for allocation in asked:
        # A configuration says one number for all sites: that of the same number of channels in all.
        count = max(1, round(sum(allocation.values()) / len(sites)))
        spec = {"base": "paper-samp", "name": "t", "placement": {"name": "absolute", "count": count}}
        started = time.process_time()
        encrypted, _ = encrypt(copy.deepcopy(model), inputs[:1], spec, seed=0, sites=sites)
        response_change(model, encrypted, inputs)
        slow += time.process_time() - started

    started = time.process_time()
    original = Original(model, sites, inputs[:1], inputs)
    most = {site: count + 1 for site, count in base.items()}
    weights = build("weights", "samp")
    found = Candidates.of(
        original, weights, np.random.default_rng(0), most, images=images, batch_size=images, cache=2**34
    )
    found.rebase(base)
    prepared = time.process_time() - started
    started = time.process_time()
    responses = found.responses(asked)
    fast = time.process_time() - started
    found.rebase(base)
    with FlopCounterMode(display=False) as again:
        found.responses(asked)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        found.network(base)(inputs[:images])
    share = again.get_total_flops() / (len(asked) * whole.get_total_flops())

    same = response_change(model, found.network(asked[-1]), torch.cat(list(found.batches)))
    error = abs(responses[-1].l2 / same.l2 - 1)
    rates = f"{len(asked) / slow:.2f}", f"{len(asked) / fast:.2f}", f"{slow / fast:.1f}"
    how = "yes" if found.fast else "no"
    return name, str(len(sites)), how, *rates, f"{share:.2f}", f"{prepared:.1f}", f"{error:.0e}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[1:])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--sites", type=int, default=8, help="sites tried, evenly from first to last")
    options = parser.parse_args()
    table = Table(title=f"{options.images} images, {torch.get_num_threads()} threads")
    for column in (
        "network",
        "sites",
        "by operators",
        "slow 1/s",
        "fast 1/s",
        "ratio",
        "share",
        "prepared s",
        "error",
    ):
        table.add_column(column)
    for name in options.networks:
        table.add_row(*measured(name, options.images, options.sites))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
