"""Runs killed again and again, at moments drawn by a seed: nothing is lost, doubled or different."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.plan import Experiment
from deepenc.arena.run.matrix import DATABASE, run
from deepenc.arena.run.store import Store

LEASE = 2.0
FIELDS = {
    "name": "x",
    "attacks": ["null", "norms", "collisions", "recalibrate", {"name": "scratch", "steps": 1}],
    "threats": [{"name": "t", "unlabelled": 8}],
    "keys": 4,
    "seed": 1,
}
SCRIPT = """
    import json, sys
    from deepenc.arena.checks.tiny import TinySource, host_defense
    from deepenc.arena.plan import Experiment
    from deepenc.arena.run.matrix import run

    folder, lease, fields = sys.argv[1:]
    experiment = Experiment(victims=(TinySource(),), defenses=(host_defense(),), **json.loads(fields))
    summary = run(experiment, folder, cache=folder, workers=2, lease=float(lease), retry_failed=True)
    sys.exit(bool(summary.problems))
"""
TARGETS = ("coordinator", "group", "worker", "server")


def start(folder):
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [str(folder / "run"), str(LEASE), json.dumps(FIELDS)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OF_THIS_TEST": str(folder)}
    with (folder / "errors").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )


def of_this_test(folder):
    """Processes that the command has started and their parents, by what their environment says."""
    sign, found = f"OF_THIS_TEST={folder}".encode(), {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and sign in (entry / "environ").read_bytes().split(b"\0"):
                state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if state != "Z":
                    found[int(entry.name)] = (int(parent), int(group))
        except OSError:
            continue
    return found


def workers_of(process, folder):
    """Worker processes, which lead groups of their own; the others that the command has started."""
    processes = of_this_test(folder)
    workers = [pid for pid, (_, group) in processes.items() if group == pid != process.pid]
    return workers, [pid for pid in processes if pid != process.pid and pid not in workers]


def strike(process, target, folder, chance):
    """Kill the command, its process group, or one of its processes; says whether it met one."""
    workers, servers = workers_of(process, folder)
    if target == "coordinator":
        process.kill()
    elif target == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        victims = workers if target == "worker" else servers
        if not victims:
            return False
        try:
            os.kill(chance.choice(victims), signal.SIGKILL)
        except ProcessLookupError:
            return False
    return True


def campaign(folder, kills, seed):
    """Start the run and kill it, until so many kills have met; then let it come to its end."""
    chance, done, rounds = random.Random(seed), Counter(), 0
    process = start(folder)
    while done.total() < kills:
        rounds += 1
        assert rounds < 20 * kills
        target = TARGETS[done.total() % len(TARGETS)]
        if chance.random() < 0.7:  # else in its start
            while process.poll() is None and not workers_of(process, folder)[0]:
                time.sleep(0.05)
        time.sleep(chance.choice((0.1, 1.0, 3.0)) * chance.random())
        if process.poll() is not None:  # the run came to its end; what is killed next is its start
            process = start(folder)
        elif strike(process, target, folder, chance):
            done[target] += 1
            if target in ("coordinator", "group"):
                process.wait()
                process = start(folder)
    for _ in range(3):  # a cell that was killed twice is failed, and tried again
        if process.wait() == 0:
            break
        process = start(folder)
    assert process.wait() == 0, (folder / "errors").read_text()[-3000:]
    return done


def cells(folder):
    with Store(folder / DATABASE) as store:
        records = store.records()
    assert len({record.cell for record in records}) == len(records)
    return [record.model_copy(update={"cost": None}) for record in records]


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(100, 2, marks=pytest.mark.long)], ids=("few", "many")
)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_nothing_is_lost_doubled_or_different(tmp_path, kills, seed):
    experiment = Experiment(victims=(TinySource(),), defenses=(host_defense(),), **FIELDS)
    (tmp_path / "killed").mkdir()
    done = campaign(tmp_path / "killed", kills, seed)
    assert done.total() == kills
    run(experiment, tmp_path / "whole", cache=tmp_path)
    assert cells(tmp_path / "killed" / "run") == cells(tmp_path / "whole")
    deadline = time.monotonic() + 30
    while of_this_test(tmp_path / "killed"):
        assert time.monotonic() < deadline, "no process is left"
        time.sleep(0.1)
    left = {path.name for path in (tmp_path / "killed" / "run").iterdir()}
    assert left <= {DATABASE, "output.txt"}
