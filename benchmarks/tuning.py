"""What a second worker gains a search: every point of one small space, fought by one process, then by two.

The search is configs/tune_digits.yaml with a space of points that cost alike, all of which both runs fight,
so that the sampler's luck is no part of the ratio. Each process has one thread of torch's, for one process
with two would use a second core as well. Wall-clock seconds; the search's own time includes the start of its
processes and the references, and all of it the measurement of the winner on fresh keys, too. Wants an idle
machine with a core for each worker.

    python benchmarks/tuning.py [--runs 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from math import prod
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from deepenc.study.search import Search
from deepenc.study.tuning import tune
from deepenc.victims.data.cache import cache_folder

CONFIG = Path(__file__).parents[1] / "configs" / "tune_digits.yaml"
SPACE = {
    "weights": ["samp", "init", "conditional"],
    "placement": ["absolute", "max-entropy:budget=5%"],
    "hardening.0.quantile": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


def search() -> Search:
    """The ready search over other points."""
    fields = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    base = {"base": "paper-samp", "name": "hardened", "hardening": ["optimise"]}
    points = prod(len(choices) for choices in SPACE.values())
    changed = {"base": base, "space": SPACE, "trials": points, "pruning": False, "seed": 1}
    return Search.model_validate(fields | changed)


def seconds(wanted: Search, workers: int) -> tuple[float, float]:
    """Of the search, and of all."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tuned = tune(wanted, folder, cache=cache_folder(), workers=workers)
        assert tuned.fought == wanted.trials
        return tuned.seconds, time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1, help="pairs of runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    wanted = search()
    wanted.victim.load(cache_folder())  # trained now where it never was
    table = Table(title=f"{wanted.trials} trials of {wanted.keys} keys, {len(wanted.attacks)} attacks")
    for column in (
        "run",
        "1 worker, s",
        "2 workers, s",
        "ratio",
        "1 worker in all, s",
        "2 in all, s",
        "ratio",
    ):
        table.add_column(column)
    for number in range(options.runs):
        (one, one_all), (two, two_all) = seconds(wanted, 1), seconds(wanted, 2)
        rates = f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}"
        table.add_row(str(number), *rates, f"{one_all:.1f}", f"{two_all:.1f}", f"{one_all / two_all:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
