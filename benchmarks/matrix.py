"""What the matrix costs beyond its attacks' own time, and what a second worker gains.

    python benchmarks/matrix.py
    python benchmarks/matrix.py --victim cifar10-resnet20 --attack finetune

The overhead of one process is everything but the attacks: loading the victim, finding sites, encrypting,
building cases, judging, storing. It is shown in parts, since judging is the measurement itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deepenc.arena import build, duel
from deepenc.arena.plan import Experiment
from deepenc.arena.run import matrix, worker
from deepenc.arena.run.matrix import DATABASE, run
from deepenc.arena.run.store import Store
from deepenc.processes.pool import Jobs, Pool
from deepenc.victims.data.cache import cache_folder

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("load the victim", worker.Workspace, "victim"),
    ("find sites", build.Subject, "of"),
    ("encrypt", build.Encryption, "of"),
    ("build the case", duel, "build_case"),
    ("attack", duel, "run_attack"),
    ("judge", duel, "measure"),
    ("store", Store, "claim"),
    ("store", Store, "finish"),
)


class Stopwatch:
    """Adds up the time spent in some functions, while it is open."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {name: 0.0 for name, _, _ in PARTS}
        self._before: list[tuple[Any, str, Any]] = []
        self._open = 0.0

    def __enter__(self) -> Stopwatch:
        for name, owner, attribute in PARTS:
            raw = vars(owner)[attribute]
            self._before.append((owner, attribute, raw))
            timed = self._timed(name, raw.__func__ if isinstance(raw, classmethod) else raw)
            setattr(owner, attribute, classmethod(timed) if isinstance(raw, classmethod) else timed)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, attribute, raw in self._before:
            setattr(owner, attribute, raw)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            outer, self._open = self._open, 0.0
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.perf_counter() - started
                self.seconds[name] += spent - self._open  # a part within a part counts once
                self._open = outer + spent

        return timed


class Inline(Pool):
    """In place of worker processes: all jobs run here, where the stopwatch sees them."""

    def run(self, jobs: Jobs[Any]) -> None:
        """See `Pool.run`."""
        handle = self.setup()
        while (job := jobs.next(0)) is not None:
            jobs.done(job, handle(jobs.message(job), partial(jobs.told, job)))


def experiment(victim: str, attack: str, keys: int) -> Experiment:
    """Two defenses against one attack that trains."""
    return Experiment.model_validate(
        {
            "name": "benchmark",
            "victims": [victim],
            "defenses": ["paper-samp", "paper-init"],
            "attacks": [attack, "null", "scratch"],
            "threats": [{"name": "labels", "labelled": 200, "unlabelled": 100}],
            "keys": keys,
            "seed": 1,
        }
    )


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--victim", default="digits-resnet")
    parser.add_argument("--attack", default="finetune")
    parser.add_argument("--keys", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a worker is one core: what a second one gains is then a fair question
    cells = experiment(chosen.victim, chosen.attack, chosen.keys)
    cache = cache_folder()
    worker.Workspace(cache).victim(cells.victims[0])  # trained or converted once, before the clock starts
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        with Stopwatch() as watch:
            matrix.Pool = Inline
            one = run(cells, Path(folder, "one"), cache=cache)
            matrix.Pool = Pool
        own = _attack_seconds(Path(folder, "one"))
        table = Table("part", "seconds", "share of the attacks", title=f"{one.run} cells, in this process")
        for name, seconds in watch.seconds.items():
            table.add_row(name, f"{seconds:.2f}", f"{seconds / own:.1%}")
        rest = one.seconds - sum(watch.seconds.values())
        table.add_row("anything else", f"{rest:.2f}", f"{rest / own:.1%}")
        table.add_section()
        table.add_row("all but the attacks", f"{one.seconds - own:.2f}", f"{one.seconds / own - 1:.1%}")
        console.print(table)
        two = run(cells, Path(folder, "two"), cache=cache, workers=2)
        busy = _attack_seconds(Path(folder, "two"))
        speed = Table("workers", "seconds", "gain", "attacks at a time", title=f"on {os.cpu_count()} cores")
        speed.add_row("1", f"{one.seconds:.1f}", "1.00", f"{own / one.seconds:.2f}")
        speed.add_row(
            "2", f"{two.seconds:.1f}", f"{one.seconds / two.seconds:.2f}", f"{busy / two.seconds:.2f}"
        )
        console.print(speed)


def _attack_seconds(folder: Path) -> float:
    with Store(folder / DATABASE, create=False) as store:
        return sum(record.cost.seconds for record in store.records() if record.cost)


if __name__ == "__main__":
    main()
