"""Runs that are interrupted in every way, resumed, and told apart."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.plan import Experiment, plan
from deepenc.arena.run.matrix import DATABASE, run
from deepenc.arena.run.progress import Progress
from deepenc.arena.run.store import Store
from deepenc.errors import ConfigError, StoreError
from deepenc.plugins import load_file

PLUGIN = '''
import os, signal, time
from typing import ClassVar
import torch
from deepenc.arena.case import Attack, Claim

LOG = os.environ.get("COUNTING_LOG", os.devnull)


def note(what, case):
    with open(LOG, "a") as file:
        file.write(f"{what} {case.defense['name']} {case.seed}\\n")


class Counting(Attack):
    """Writes down every duel it fights."""

    name: ClassVar[str] = "counting"
    pause: float = 0.0
    kill_once: str = ""
    kill: bool = False
    fail: bool = False

    def attack(self, case):
        note("start", case)
        time.sleep(self.pause)
        if self.fail and os.environ.get("COUNTING_FAILS", "1") == "1":
            raise RuntimeError("planted failure")
        if self.kill or (self.kill_once and not os.path.exists(self.kill_once)):
            if self.kill_once:
                open(self.kill_once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        note("end", case)
        scores = {s.name: torch.rand(s.width, generator=case.generator()) for s in case.sites}
        return Claim(scores=scores)
'''

SCRIPT = """
import sys
from pathlib import Path
from deepenc.arena.checks.tiny import host_defense
from deepenc.arena.run.matrix import run
from deepenc.arena.plan import Experiment
from deepenc.arena.checks.tiny import TinySource
from deepenc.plugins import load_file
import json

LEASE = 3.0

def main():
    folder, plugin, workers, fields = sys.argv[1:]
    load_file(plugin)
    experiment = Experiment(victims=(TinySource(),), defenses=(host_defense(),), **json.loads(fields))
    try:
        run(experiment, folder, cache=folder, workers=int(workers), plugin_files=[plugin], lease=LEASE)
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
"""

REFERENCES = ["null", {"name": "scratch", "steps": 1}]


@pytest.fixture
def plugin(tmp_path_factory):
    # One file for all tests: a name cannot be registered from two files.
    path = tmp_path_factory.getbasetemp() / "counting.py"
    if not path.exists():
        path.write_text(PLUGIN)
    load_file(path)
    return path


@pytest.fixture
def log(tmp_path, monkeypatch, plugin):
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("COUNTING_LOG", str(path))
    monkeypatch.setattr(sys.modules[load_file(plugin)[0].__module__], "LOG", str(path))
    return path


def fields(**more):
    return {
        "name": "x",
        "attacks": [{"name": "counting"} | more.pop("counting", {}), *REFERENCES],
        "threats": [{"name": "t", "labelled": 0}],
        "keys": 2,
        "seed": 1,
    } | more


def experiment(**more):
    return Experiment(victims=(TinySource(),), defenses=(host_defense(),), **fields(**more))


def fight(folder, **more):
    options = {key: more.pop(key) for key in ("workers", "retry_failed", "timeout", "lease") if key in more}
    return run(experiment(**more), folder, cache=folder, **options)


def count(log, what):
    return Counter(line for line in log.read_text().splitlines() if line.startswith(what))


def records(folder):
    with Store(folder / DATABASE) as store:
        return store.records()


def comparable(folder):
    return [record.model_copy(update={"cost": None, "provenance": None}) for record in records(folder)]


class Watcher(Progress):
    def __init__(self, interrupt_after=None):
        self.calls, self.interrupt_after = [], interrupt_after

    def planned(self, total, finished):
        self.calls.append(("planned", total, finished))

    def started(self, cell):
        self.calls.append(("started", cell))
        if self.interrupt_after is not None and len(self.calls) > self.interrupt_after:
            raise KeyboardInterrupt

    def finished(self, cell, record):
        self.calls.append(("finished", cell, record.state))


def test_all_cells_are_fought_once_and_told(tmp_path, log):
    watcher = Watcher()
    summary = run(experiment(), tmp_path, cache=tmp_path, progress=watcher)
    # Null defense: null and scratch; the other: counting and null; two keys each.
    assert (summary.run, dict(summary.states), summary.encryptions) == (8, {"done": 8}, 4)
    assert watcher.calls[0] == ("planned", 8, 0)
    assert [c[0] for c in watcher.calls[1:]] == ["started", "finished"] * 8
    assert len(records(tmp_path)) == 8
    assert set(count(log, "end").values()) == {1}
    again = fight(tmp_path)
    assert (again.run, again.encryptions) == (0, 0)
    assert sum(count(log, "start").values()) == 2


def test_plan_has_references_once(plugin):
    cells = [(c.defense.name, c.entry.label, c.key) for c in plan(experiment())]
    assert Counter(cells) == {
        (d, a, k): 1
        for k in (0, 1)
        for d, a in [("null", "null"), ("null", "scratch"), ("host", "counting"), ("host", "null")]
    }


def test_a_changed_experiment_keeps_what_still_matches(tmp_path, log):
    fight(tmp_path)
    more = fight(tmp_path, keys=3)
    assert (more.run, sum(more.states.values())) == (4, 12)
    fewer = fight(tmp_path, keys=1)
    assert (fewer.run, dict(fewer.states)) == (0, {"done": 4})
    assert len(records(tmp_path)) == 4
    other = fight(tmp_path, keys=1, counting={"pause": 0.001})
    assert other.run == 1


def test_each_run_without_a_seed_draws_its_own_keys(tmp_path, log):
    fight(tmp_path / "a", seed=None)
    assert fight(tmp_path / "a", seed=None).run == 0
    fight(tmp_path / "b", seed=None)
    assert {r.cell for r in records(tmp_path / "a")}.isdisjoint(r.cell for r in records(tmp_path / "b"))
    with Store(tmp_path / "a" / DATABASE) as store:
        assert len(store.get("root")) == 64


def test_failed_cells_have_a_traceback_and_are_retried_on_demand(tmp_path, log, monkeypatch):
    monkeypatch.setenv("COUNTING_FAILS", "1")
    summary = fight(tmp_path, counting={"fail": True})
    assert dict(summary.states) == {"done": 6, "failed": 2}
    reasons = [r.reason for r in records(tmp_path) if r.state == "failed"]
    assert all("planted failure" in reason and "Traceback" in reason for reason in reasons)
    monkeypatch.setenv("COUNTING_FAILS", "0")
    assert fight(tmp_path, counting={"fail": True}).run == 0
    assert dict(fight(tmp_path, counting={"fail": True}, retry_failed=True).states) == {"done": 8}


def test_an_interrupt_gives_running_cells_back(tmp_path, log):
    with pytest.raises(KeyboardInterrupt):
        run(experiment(), tmp_path, cache=tmp_path, progress=Watcher(interrupt_after=4))
    with Store(tmp_path / DATABASE) as store:
        assert Counter(store.states().values()) == {"planned": 6, "done": 2}
    assert fight(tmp_path).run == 6


def test_workers_below_one(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        fight(tmp_path, workers=0)


def test_two_workers_find_what_one_finds_though_one_dies(tmp_path, log, plugin):
    mark = tmp_path / "killed"
    attacks = [{"name": "counting", "kill_once": str(mark)}, *REFERENCES]
    summary = fight(tmp_path / "two", workers=2, attacks=attacks, keys=1)
    assert mark.exists()
    assert dict(summary.states) == {"done": 4}
    fight(tmp_path / "one", attacks=attacks, keys=1)
    assert comparable(tmp_path / "one") == comparable(tmp_path / "two")


def start(folder, plugin, workers, log, **more):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [str(script), str(folder), str(plugin), str(workers), json.dumps(fields(**more))]
    environment = os.environ | {"COUNTING_LOG": str(log), "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )


def wait_for(log, ends, process):
    deadline = time.monotonic() + 120
    while sum(count(log, "end").values()) < ends:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_at_any_moment_and_started_again(tmp_path, log, plugin):
    slow = {"keys": 4, "counting": {"pause": 0.5}}
    process = start(tmp_path, plugin, 2, log, **slow)
    wait_for(log, 2, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):  # its workers end with it
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    with Store(tmp_path / DATABASE) as store:
        before = Counter(store.states().values())
        finished = {r.cell for r in store.records()}
    assert before["done"] >= 1 and before["planned"] >= 1 and before["running"] >= 1
    summary = fight(tmp_path, **slow)
    assert dict(summary.states) == {"done": 16}
    assert summary.run == 16 - len(finished)
    # Only the duels that were under way, one a worker, can have been started twice.
    starts = count(log, "start")
    assert len(starts) == 4
    assert sum(starts.values()) <= 6


def test_ctrl_c_ends_workers_and_gives_cells_back(tmp_path, log, plugin):
    process = start(tmp_path, plugin, 2, log, keys=6, counting={"pause": 0.5})
    wait_for(log, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    with Store(tmp_path / DATABASE) as store:
        states = Counter(store.states().values())
    assert states["running"] == 0 and states["done"] >= 1 and states["planned"] >= 1


def taken(folder, seconds):
    """Plan a run and take one cell, as another run would, with a lease that is good for some seconds."""
    with pytest.raises(KeyboardInterrupt):
        run(experiment(), folder, cache=folder, progress=Watcher(interrupt_after=0))
    with Store(folder / DATABASE) as store:
        store.renew("another host", seconds)
        store.claim(next(iter(store.states())), "another host")


def test_cells_of_a_run_that_is_no_more_are_waited_for_and_taken_over(tmp_path, log):
    taken(tmp_path, 8)
    summary = fight(tmp_path)
    assert (dict(summary.states), summary.run, summary.problems) == ({"done": 8}, 8, ())


def test_cells_of_a_run_that_is_alive_are_left_to_it_and_told(tmp_path, log):
    taken(tmp_path, 600)
    with Store(tmp_path / DATABASE) as store:
        over = threading.Event()

        def renew():
            while not over.wait(0.2):
                store.renew("another host", 600)

        other = threading.Thread(target=renew)
        other.start()
        try:
            summary = fight(tmp_path)
        finally:
            over.set()
            other.join()
    assert dict(summary.states) == {"done": 7, "running": 1}
    assert summary.problems == ("1 cell is being run by another command",)


def test_finished_cells_of_another_experiment_are_counted(tmp_path, log):
    assert fight(tmp_path).kept == 0
    summary = fight(tmp_path, keys=1)
    assert summary.kept == 4
    assert fight(tmp_path).kept == 0


def test_failed_cells_are_a_problem(tmp_path, log):
    summary = fight(tmp_path, counting={"fail": True})
    assert summary.problems == ("2 cells are failed; try again with --retry-failed",)


def test_a_run_is_not_put_into_a_release(tmp_path, log):
    (tmp_path / "deepenc.json").write_text("{}")
    with pytest.raises(StoreError, match=r"encrypted network.*another folder"):
        fight(tmp_path)
    assert not (tmp_path / DATABASE).exists()


@pytest.mark.parametrize("slip", [{"keys": 3_000_000}, {"keys": 10**12}, {"repeats": 10**9}])
def test_a_slip_of_zeros_is_told_at_once(tmp_path, log, slip):
    with pytest.raises(ConfigError, match=r"at most 1,000,000 cells, got .* slip"):
        fight(tmp_path, **slip)


@pytest.mark.parametrize("database", ["nonsense", "nosuch://x", "sqlite:////nosuch/folder/x.db"])
def test_a_database_that_cannot_be_used(tmp_path, log, database):
    with pytest.raises(StoreError) as caught:
        run(experiment(), tmp_path, cache=tmp_path, database=database)
    assert len(str(caught.value).splitlines()) == 1
