"""Searches killed again and again, at any moment and inside a write, end as if nobody had disturbed them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepenc.arena.run.matrix import DATABASE
from deepenc.arena.run.store import Store
from deepenc.plugins import _loaded, load_file
from deepenc.study.search import Search
from deepenc.study.storage import JOURNAL, open_study

PLUGIN = '''
import time
from typing import ClassVar
import torch
from deepenc.arena.case import Attack, Claim
from deepenc.arena.checks.tiny import TinySource


class Tiny(TinySource):
    """The tiny network, for worker processes."""

    name: ClassVar[str] = "tiny-of-kills"


class Slow(Attack):
    """Takes its time."""

    name: ClassVar[str] = "slow-of-kills"

    def attack(self, case):
        time.sleep(0.1)
        return Claim(scores={s.name: torch.rand(s.width, generator=case.generator()) for s in case.sites})
'''

# Its last argument: after how many writes to the journal the command dies in the middle of one; 0 is never.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from deepenc.plugins import load_file
from deepenc.study.journal import Journal
from deepenc.study.search import Search
from deepenc.study.tuning import tune


def append(self, logs, left=[int(sys.argv[5])]):
    left[0] -= 1
    if left[0] == 0:
        line = json.dumps(logs[0]).encode()
        with self._path.open("ab") as file:
            file.write(line[: len(line) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, logs)


if __name__ == "__main__":
    folder, plugin, fields, workers, writes = sys.argv[1:]
    whole = Journal.append_logs
    if int(writes):
        Journal.append_logs = append
    load_file(plugin)
    search = Search.model_validate(json.loads(fields))
    tune(search, Path(folder).name, cache=folder, workers=int(workers), plugin_files=[plugin])
"""

TRIALS = 14
LONGEST = 600
"""Seconds after which a command counts as stuck."""
FIELDS = {
    "name": "s",
    "victim": "tiny-of-kills",
    "space": {"placement.proportion": [n / 100 for n in range(3, 23)], "weights": ["samp", "init"]},
    "attacks": ["slow-of-kills"],
    "objectives": ["damage-per-memory"],
    "trials": TRIALS,
    "keys": 1,
    "fresh_keys": 2,
    "pruning": False,
    "seed": 1,
}


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "slow.py"
    path.write_text(PLUGIN)
    (tmp_path / "script.py").write_text(SCRIPT)
    load_file(path)
    yield path
    _loaded.pop(("victim", "tiny-of-kills"), None)
    _loaded.pop(("attack", "slow-of-kills"), None)


def start(folder: Path, plugin: Path, workers: int, writes: int) -> subprocess.Popen[bytes]:
    script = str(plugin.parent / "script.py")
    arguments = [str(folder), str(plugin), json.dumps(FIELDS), str(workers), str(writes)]
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=folder.parent,  # the study's folder is relative, as it is on the command line
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The worker processes: what the process that they are forked from has forked."""
    return [child for own in _children(process.pid) for child in _children(own)]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # gone
        return []


def wait_for(folder: Path, growth: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many bytes were written to the journal and the fresh duels, or the command has ended."""

    def size() -> int:
        paths = [path for path in (folder / JOURNAL, *(folder / "fresh").glob("*")) if path.is_file()]
        return sum(path.stat().st_size for path in paths)

    before = size()
    while process.poll() is None and size() - before < growth:
        time.sleep(0.005)


def finished(folder: Path) -> dict[int, object]:
    """Trials that have ended, by number."""
    if not (folder / JOURNAL).exists():
        return {}
    trials = open_study(Search.model_validate(FIELDS), folder).get_trials(deepcopy=False)
    return {trial.number: trial for trial in trials if trial.state.is_finished()}


def disturb(folder: Path, plugin: Path, kills: int, rng: random.Random, most_workers: int) -> int:
    """Start a search and kill it, again and again until it has ended; says how often it was killed."""
    made = 0
    while made < kills:
        before = finished(folder)
        writes = rng.choice([0, 0, rng.randrange(1, 40)])
        process = start(folder, plugin, rng.randint(1, most_workers), writes)
        try:
            made += killed(process, folder, rng) if not writes else process.wait(LONGEST) != 0
        finally:
            if process.poll() is None:
                process.kill()
            _, said = process.communicate()
        assert b"Error" not in said, said.decode()
        after = finished(folder)
        assert {number: after[number] for number in before} == before, "what has ended stays as it is"
        if process.returncode == 0:
            break
    return made


def killed(process: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> int:
    """Kill a command, alone, with its workers, or after one of them; how many kills that were."""
    made = 0
    while process.poll() is None:
        wait_for(folder, rng.randrange(1, 8000), process)
        time.sleep(rng.random() * 0.2)
        how, workers = rng.choice(["command", "group", "worker"]), workers_of(process)
        if process.poll() is None and how != "worker":
            (os.killpg if how == "group" else os.kill)(process.pid, signal.SIGKILL)
            process.wait(LONGEST)
            return made + 1
        if workers and not made:  # a second one might cost the same trial another worker, which fails it
            os.kill(rng.choice(workers), signal.SIGKILL)
            made = 1
    return made


def check(folder: Path) -> None:
    """Hold a search that came to its end to what an undisturbed one leaves."""
    trials = open_study(Search.model_validate(FIELDS), folder).get_trials()
    assert [trial.number for trial in trials] == list(range(TRIALS)), "none is lost"
    assert {trial.state.name for trial in trials} == {"COMPLETE"}, "none is left running"
    assert len({json.dumps(trial.params) for trial in trials}) == TRIALS, "none is doubled"
    assert all(trial.user_attrs["records"] for trial in trials)
    with Store(folder / "fresh" / DATABASE, create=False) as store:
        assert set(store.states().values()) == {"done"}
        assert len({(r.defense, r.attack, r.key) for r in store.records()}) == len(store.records())


def campaign(root: Path, plugin: Path, kills: int, rng: random.Random, most_workers: int = 2) -> None:
    made = number = 0
    while made < kills:
        folder = root / f"run{number}"
        made += disturb(folder, plugin, kills - made, rng, most_workers)
        last = start(folder, plugin, most_workers, 0)
        _, said = last.communicate(timeout=LONGEST)
        assert last.returncode == 0, said.decode()
        check(folder)
        number += 1


def test_a_search_killed_twice(plugin: Path, tmp_path: Path) -> None:
    campaign(tmp_path, plugin, 2, random.Random(1), most_workers=1)


@pytest.mark.long
def test_searches_killed_sixty_times(plugin: Path, tmp_path: Path) -> None:
    campaign(tmp_path, plugin, 60, random.Random(0))
