"""Whatever an attack does to its process: its own cells say so, the others are done, the run ends."""

import os
import time
from collections import Counter

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.plan import Experiment
from deepenc.arena.run.matrix import DATABASE, OUTPUT, run
from deepenc.arena.run.progress import Progress
from deepenc.arena.run.store import Store
from deepenc.plugins import load_file

PLUGIN = '''
import ctypes, os, signal, subprocess, sys, threading, time
from typing import ClassVar
import torch
from torch.utils.data import DataLoader, TensorDataset
from deepenc.arena.case import Attack, Claim


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Exits(torch.nn.Module):
    def forward(self, images):
        sys.exit(3)


class IllBehaved(Attack):
    """Does something that an attack should not do."""

    name: ClassVar[str] = "ill-behaved"
    how: str = "nothing"
    mark: str = ""

    def attack(self, case):
        getattr(self, self.how.replace(" ", "_"))(case)
        return Claim(network=Exits() if self.how == "exit_when_judged" else case.copy())

    def nothing(self, case):
        """Even this."""

    def exit(self, case): sys.exit(0)
    def exit_when_judged(self, case): pass
    def interrupt(self, case): raise KeyboardInterrupt
    def generator_exit(self, case): raise GeneratorExit
    def leave_at_once(self, case): os._exit(0)
    def crash(self, case): ctypes.string_at(0)
    def abort(self, case): os.abort()
    def unspeakable(self, case): raise Unspeakable
    def surrogate(self, case): raise RuntimeError("\\ud800")
    def zero_byte(self, case): raise RuntimeError("a\\0b\\x1b[31m[/red]")
    def long_text(self, case): raise RuntimeError("x" * 50_000_000)
    def recursion(self, case): self.recursion(case)
    def close_files(self, case): os.closerange(3, 60)
    def close_streams(self, case): sys.stdout.close(); sys.stderr.close()
    def fork(self, case): os.fork()
    def change_folder(self, case): os.chdir("/")
    def alarm(self, case): signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(1)
    def thread(self, case): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    def print(self, case): sys.stdout.write("hello from the plugin\\n")
    def wait(self, case): time.sleep(600)

    def child(self, case):
        with open(self.mark, "a") as file:
            for session in (False, True):
                file.write(f"{subprocess.Popen(['sleep', '600'], start_new_session=session).pid}\\n")

    def load_data(self, case):
        for _ in DataLoader(TensorDataset(case.unlabelled.inputs), batch_size=4, num_workers=1):
            pass
'''

FAILS = {
    "exit": "SystemExit: 0",
    "exit_when_judged": "SystemExit: 3",
    "interrupt": "KeyboardInterrupt",
    "generator_exit": "GeneratorExit",
    "leave_at_once": "died 2 times (exit code 0)",
    "crash": "died 2 times (SIGSEGV)",
    "abort": "died 2 times (SIGABRT)",
    "unspeakable": "Unspeakable: <exception str() failed>",
    "surrogate": r"RuntimeError: \ud800",
    "zero_byte": r"RuntimeError: a\x00b\x1b[31m[/red]",
    "long_text": "RuntimeError: xxx",
    "recursion": "RecursionError",
    "close_files": "died 2 times",
}
PASSES = ("close_streams", "fork", "change_folder", "alarm", "thread", "load_data", "child")


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "ill_behaved.py"
    path.write_text(PLUGIN)
    load_file(path)


def experiment(*hows, mark="", **more):
    attacks = [{"name": "ill-behaved", "how": how, "label": how, "mark": str(mark)} for how in hows]
    fields = {"name": "x", "keys": 1, "seed": 1, "threats": [{"name": "t", "unlabelled": 8}]} | more
    attacks = [*attacks, "null", {"name": "scratch", "steps": 1}]
    return Experiment(victims=(TinySource(),), defenses=(host_defense(),), attacks=attacks, **fields)


def records(folder):
    with Store(folder / DATABASE) as store:
        return {(r.defense, r.attack): r for r in store.records()}


@pytest.mark.parametrize(
    ("workers", "fails", "passes"),
    [(1, tuple(FAILS), PASSES), (2, ("exit", "leave_at_once", "surrogate"), ("fork", "load_data", "child"))],
    ids=("one", "two"),
)
def test_every_attack_has_a_record_of_its_own(tmp_path, workers, fails, passes):
    mark = tmp_path / "pids"
    matrix = experiment(*fails, "nothing", *passes, "print", mark=mark)
    summary = run(matrix, tmp_path, cache=tmp_path, workers=workers)
    assert dict(summary.states) == {"failed": len(fails), "done": len(passes) + 5}
    assert any("failed" in problem for problem in summary.problems)
    found = records(tmp_path)
    assert "host" in {defense for defense, _ in found}
    for how in fails:
        reason = found["host", how].reason
        assert FAILS[how] in reason.splitlines()[0], how
        assert len(reason) <= 20_000
    as_it_is = found["host", "nothing"].score
    assert all(found["host", how].score == as_it_is for how in passes)
    pids = mark.read_text().split()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "what an attack starts does not outlive the run"
        time.sleep(0.05)
    assert "hello from the plugin" in (tmp_path / OUTPUT).read_text()


def test_the_process_s_output_stays_out_of_the_way(tmp_path, capfd):
    run(experiment("print"), tmp_path, cache=tmp_path)
    assert capfd.readouterr() == ("", "")


class Watcher(Progress):
    def __init__(self):
        self.seen = Counter()

    def running(self, cells):
        self.seen.update(cell.entry.label for cell, seconds in cells if seconds > 0.5)


def test_an_attack_that_does_not_end_is_out_of_budget(tmp_path):
    threats = [{"name": "patient", "seconds": 600}, {"name": "hurried", "seconds": 3}]
    watcher = Watcher()
    matrix = experiment("wait", "nothing", threats=threats, keys=1)
    summary = run(matrix, tmp_path, cache=tmp_path, timeout=6, workers=2, progress=watcher)
    assert summary.states["out_of_budget"] == 2 and "failed" not in summary.states
    with Store(tmp_path / DATABASE) as store:
        late = {r.threat: r for r in store.records() if r.state == "out_of_budget"}
        assert "threat 'hurried' allows 3 s" in late["hurried"].reason
        assert "time limit, 6 s" in late["patient"].reason and "--retry-failed" in late["patient"].reason
        assert store.retry_failed() == 1, "what the threat model says is final"
    assert watcher.seen["wait"] >= 2
