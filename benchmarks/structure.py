"""Finding sites, encrypting and decrypting, beside Torch-Pruning doing the inverse.

For each network, in processes of their own and in turn:

* deepenc: find_sites, encrypt with 5 % more channels at every site, decrypt;
* Torch-Pruning: dependency graph, all groups, pruning 5 % of the channels of every group.

Prints wall time, peak memory above that of the loaded network, and the ratio in this run. Who needs more than
16 GiB, or raises, or takes more than 10 minutes, has failed.

    python benchmarks/structure.py [--networks resnet18 vgg16 ...] [--repeats 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
import torch_pruning
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import deepenc

PROPORTION = 0.05
DEFENSE = deepenc.Defense.model_validate(
    {
        "name": "bench",
        "placement": {"name": "proportional", "proportion": PROPORTION},
        "weights": "samp",
    }
)
NETWORKS = [
    "resnet18",
    "resnet152",
    "vgg16",
    "densenet201",
    "vit_b_16",
    "swin_t",
    "convnext_tiny",
    "mobilenet_v3_large",
    "regnet_y_16gf",
]
MEMORY = 16 * 2**30
SECONDS = 600


def deepenc_round(model: nn.Module, example: Tensor) -> str:
    """Find sites, encrypt, decrypt; says how many channels went in."""
    sites = deepenc.find_sites(model, example)
    encrypted, key = deepenc.encrypt(model, example, DEFENSE, sites=sites, seed=0)
    original = deepenc.decrypt(encrypted, key).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    return f"{sum(key.allocation.values())} in {len(sites)} sites"


def pruning_round(model: nn.Module, example: Tensor) -> str:
    """Build the dependency graph and prune every group; says how many channels went out."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    pruned = groups = 0
    found = graph.get_all_groups(ignored_layers=last, root_module_types=[nn.Conv2d, nn.Linear])
    for group in list(found):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        count = max(1, round(PROPORTION * graph.get_out_channels(root)))
        part = graph.get_pruning_group(root, prune, idxs=list(range(count)))
        if graph.check_pruning_group(part):
            part.prune()
            pruned, groups = pruned + count, groups + 1
    return f"{pruned} in {groups} groups"


def tiny() -> nn.Module:
    """A network to warm up on."""
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 16, 4)).eval()


def measure(name: str, work: Callable[[nn.Module, Tensor], str]) -> tuple[float, float, str]:
    """Seconds, peak MiB above the loaded network, and what was done; in the calling process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    # Imports and lazy initialisations are nobody's cost: both are warm when the clock starts.
    with torch.no_grad():
        model(example)
    work(tiny(), torch.randn(1, 3, 8, 8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    try:
        done = work(model, example)
    except Exception as error:
        done = f"failed: {type(error).__name__}: {str(error)[:60]}"
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, peak / 1024, done


def measured(name: str, work: Callable[[nn.Module, Tensor], str]) -> tuple[float, float, str]:
    """`measure` in a process of its own, which may die or hang."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return pool.submit(measure, name, work).result(timeout=SECONDS)
    except (BrokenProcessPool, TimeoutError) as error:
        return float("nan"), float("nan"), f"failed: {type(error).__name__}"
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown()


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    table = Table(title=f"Median of {options.repeats}; peak memory above the loaded network")
    for column in ("network", "deepenc s", "MiB", "done", "Torch-Pruning s", "MiB", "done", "times faster"):
        table.add_column(column)
    for name in options.networks:
        rows: dict[str, list[tuple[float, float, str]]] = {"ours": [], "theirs": []}
        for _ in range(options.repeats):
            for who, work in (("ours", deepenc_round), ("theirs", pruning_round)):
                rows[who].append(measured(name, work))
        cells = [name]
        seconds = {}
        for who in ("ours", "theirs"):
            seconds[who] = statistics.median(row[0] for row in rows[who])
            peak = statistics.median(row[1] for row in rows[who])
            cells += [f"{seconds[who]:.2f}", f"{peak:.0f}", rows[who][0][2]]
        failed = rows["theirs"][0][2].startswith("failed") or rows["ours"][0][2].startswith("failed")
        table.add_row(*cells, "" if failed else f"{seconds['theirs'] / seconds['ours']:.1f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
