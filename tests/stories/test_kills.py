"""Runs killed again and again, at moments drawn by a seed: nothing is lost, doubled or different."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import closing
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
    sys.exit(3 if summary.problems else 0)
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
            if entry.name.isdigit() and sign in (entry / "environ").read_bytes():
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


def finished(folder):
    """Cells with a record, as anybody sees them who looks into the database."""
    try:
        with closing(sqlite3.connect(f"file:{folder / 'run' / DATABASE}?mode=ro", uri=True)) as connection:
            return connection.execute("select count(*) from cells where record is not null").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet, or locked
        return 0


def wait_for_a_moment(process, folder, chance):
    """Until a moment drawn at random: in the command's start, or when it has finished some cells."""
    if chance.random() < 0.3:
        time.sleep(3 * chance.random())
        return
    wanted = finished(folder) + chance.randrange(1, 5)
    while process.poll() is None and finished(folder) < wanted:
        time.sleep(0.05)
    time.sleep(0.3 * chance.random())


def campaign(base, kills, seed):
    """Start runs and kill them, until so many kills have met and the last run has come to its end.

    Returns:
        The folders of the runs, and how often each target was met.
    """
    chance, done, folders, process = random.Random(seed), Counter(), [], None
    while True:
        if process is None:
            folders.append(base / f"run{len(folders)}")
            folders[-1].mkdir(parents=True)
            process = start(folders[-1])
        if done.total() == kills:
            process.wait()
        else:
            wait_for_a_moment(process, folders[-1], chance)
        target = TARGETS[done.total() % len(TARGETS)]
        if process.poll() is None:
            if strike(process, target, folders[-1], chance):
                done[target] += 1
                if target in ("coordinator", "group"):
                    process.wait()
                    process = start(folders[-1])
        elif process.returncode == 0:
            process = None
            if done.total() == kills:
                return folders, done
        else:  # a cell whose worker was killed twice has failed: it is tried again
            assert process.returncode == 3, (folders[-1] / "errors").read_text()[-3000:]
            process = start(folders[-1])


def cells(folder):
    with Store(folder / DATABASE) as store:
        records = store.records()
    assert len({record.cell for record in records}) == len(records)
    return [record.model_copy(update={"cost": None, "provenance": None}) for record in records]


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 1), pytest.param(100, 2, marks=pytest.mark.long)], ids=("few", "many")
)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_nothing_is_lost_doubled_or_different(tmp_path, kills, seed):
    experiment = Experiment(victims=(TinySource(),), defenses=(host_defense(),), **FIELDS)
    run(experiment, tmp_path / "whole", cache=tmp_path)
    expected = cells(tmp_path / "whole")
    folders, done = campaign(tmp_path / "killed", kills, seed)
    sys.stdout.write(f"{dict(done)} in {len(folders)} runs of {len(expected)} cells\n")
    for folder in folders:
        assert cells(folder / "run") == expected
        assert {path.name for path in (folder / "run").iterdir()} <= {DATABASE, "output.txt"}
    deadline = time.monotonic() + 30
    while of_this_test(tmp_path / "killed"):
        assert time.monotonic() < deadline, "no process is left"
        time.sleep(0.1)
