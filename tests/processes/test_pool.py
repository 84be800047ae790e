"""The worker loop: whatever a job does to its process, the others are run, and nothing is left behind."""

import ctypes
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
import torch

from deepenc.errors import VictimError, WorkerError
from deepenc.processes import pool
from deepenc.processes.pool import STARTS, Jobs, Pool
from deepenc.processes.residue import Surroundings
from deepenc.processes.worker import METHOD, warm_up


def obey(message, tell):
    """A handler that does what it is told."""
    match message:
        case "exit", code:
            sys.exit(code)
        case "die", _:
            os._exit(7)
        case "interrupt", _:
            raise KeyboardInterrupt
        case "crash", _:
            ctypes.string_at(0)
        case "kill once", mark if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill parent once", mark if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getppid(), signal.SIGKILL)
        case "close", _:
            os.closerange(3, 60)
        case "fork", _:
            os.fork()
        case "close streams", _:
            sys.stdout.close()
            sys.stderr.close()
        case "sleep", seconds:
            time.sleep(seconds)
        case "ask", what:
            return tell(what)
        case "raise", _:
            raise VictimError("nothing to run on")
        case "thread", _:
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        case "patch", _:
            surroundings = Surroundings()
            torch.add = torch.mul
            surroundings.restore()
        case "child", mark:
            for session in (False, True):
                child = subprocess.Popen(["sleep", "600"], start_new_session=session)
                with Path(mark).open("a") as file:
                    file.write(f"{child.pid}\n")
        case "environment", _:
            return dict(os.environ)
    return os.getpid()


def ready():
    return obey


class Script(Jobs):
    """A list of messages, and what became of each."""

    def __init__(self, *messages, limit=None):
        self.waiting, self.limit = list(enumerate(messages)), limit
        self.results, self.reasons, self.given, self.late = {}, {}, Counter(), []

    def next(self, slot):
        return self.waiting.pop(0) if self.waiting else None

    def left(self):
        return bool(self.waiting)

    def message(self, job):
        self.given[job[0]] += 1
        self.begun = time.monotonic()
        return job[1]

    def told(self, job, note):
        return note * 2

    def deadline(self, job):
        return None if self.limit is None else self.begun + self.limit

    def overdue(self, job):
        self.late.append(job[0])

    def done(self, job, result):
        self.results[job[0]] = result

    def lost(self, job, reason):
        self.reasons[job[0]] = reason


@pytest.fixture(scope="module", autouse=True)
def _torch_is_loaded_once():
    """Workers import this file, and with it torch; forked from a process that has it, they start at once."""
    warm_up(["torch", "deepenc.processes.residue"])


@pytest.fixture
def play(tmp_path):
    def played(*messages, size=1, setup=ready, **more):
        script = Script(*messages, **more)
        with Pool(setup, size, tmp_path / "output.txt") as workers:
            workers.run(script)
        return script

    return played


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_process_lives_for_many_jobs(play):
    script = play(*[("sleep", 0)] * 6, size=2)
    assert sorted(script.results) == list(range(6))
    assert len(set(script.results.values())) <= 2
    assert os.getpid() not in script.results.values()


@pytest.mark.parametrize(
    ("message", "how"),
    [
        (("exit", 0), "exit code 0"),
        (("exit", 3), "exit code 3"),
        (("die", None), "exit code 7"),
        (("interrupt", None), "KeyboardInterrupt"),
        (("crash", None), "SIGSEGV"),
        (("close", None), "died 2 times"),
    ],
)
def test_what_ends_its_process_is_lost_alone(play, message, how):
    script = play(("sleep", 0), message, ("sleep", 0))
    assert set(script.results) == {0, 2} and set(script.reasons) == {1}
    assert "died 2 times" in script.reasons[1] and how in script.reasons[1]
    assert script.given[1] == 2


def test_a_job_whose_process_was_killed_is_tried_again(play, tmp_path):
    script = play(("kill once", str(tmp_path / "mark")), ("sleep", 0))
    assert set(script.results) == {0, 1} and script.given[0] == 2 and not script.reasons


def test_a_job_that_takes_too_long_is_stopped(play):
    started = time.monotonic()
    script = play(("sleep", 0), ("sleep", 600), ("sleep", 0), limit=1.5)
    assert script.late == [1] and set(script.results) == {0, 2}
    assert time.monotonic() - started < 60


def test_notes_are_answered(play):
    assert play(("ask", 21)).results == {0: 42}


def test_an_error_of_all_jobs_ends_the_run(play):
    with pytest.raises(VictimError, match="nothing to run on"):
        play(("raise", None), ("sleep", 0))


def test_a_forked_copy_does_not_answer(play):
    script = play(("fork", None), ("sleep", 0), ("sleep", 0))
    assert set(script.results) == {0, 1, 2}
    assert all(count == 1 for count in script.given.values())


def test_nothing_that_a_job_starts_outlives_the_pool(play, tmp_path):
    mark = tmp_path / "pids"
    script = play(("child", str(mark)), ("sleep", 0))
    assert script.results[0] != script.results[1], "the next job has a process of its own"
    pids = [int(line) for line in mark.read_text().split()]
    deadline = time.monotonic() + 60
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_thread_that_goes_on_does_not_disturb_the_next_job(play):
    script = play(("thread", None), ("sleep", 0), ("sleep", 0))
    assert script.results[0] != script.results[1] == script.results[2]


def test_a_process_whose_functions_were_replaced_does_no_other_job(play):
    script = play(("patch", None), ("sleep", 0), ("sleep", 0))
    assert script.results[0] != script.results[1] == script.results[2]


def test_closed_streams_do_not_disturb_the_next_job(play):
    script = play(("close streams", None), ("sleep", 0))
    assert script.results[0] != script.results[1]


def test_no_worker_has_the_passphrase(play, monkeypatch):
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse")
    monkeypatch.setenv("DEEPENC_OTHER", "kept")
    environment = play(("environment", None)).results[0]
    assert "DEEPENC_PASSPHRASE" not in environment and environment["DEEPENC_OTHER"] == "kept"
    assert os.environ["DEEPENC_PASSPHRASE"] == "correct horse"


def broken():
    sys.stdout.write("what is wrong here\n")
    raise RuntimeError("planted")


def test_a_process_that_cannot_start_is_nobody_s_fault(play):
    script = Script(("sleep", 0))
    with pytest.raises(WorkerError, match=r"(?s)cannot start.*__main__.*what is wrong here.*planted"):
        play(("sleep", 0), setup=broken)
    assert not script.given


class KilledAtStart:
    """Kills its process a number of times before it is ready."""

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def __call__(self):
        count = len(list(self.folder.glob("start*")))
        (self.folder / f"start{count}").touch()
        if count < self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return obey


def test_processes_killed_before_they_are_ready_are_started_again(play, tmp_path):
    assert set(play(("sleep", 0), setup=KilledAtStart(tmp_path, STARTS - 1)).results) == {0}


def test_but_not_for_ever(play, tmp_path):
    with pytest.raises(WorkerError, match="SIGKILL"):
        play(("sleep", 0), setup=KilledAtStart(tmp_path, 1000))


@pytest.mark.skipif(METHOD != "forkserver", reason="there is no process that forks")
def test_the_process_that_forks_is_started_again(play, tmp_path):
    script = play(("kill parent once", str(tmp_path / "mark")), ("sleep", 0))
    assert set(script.results) == {0, 1} and not script.reasons


def test_a_process_that_could_not_be_forked_is_started_again(play, monkeypatch):
    failures = [BrokenPipeError(), EOFError(), ConnectionRefusedError()]
    start = pool.Worker

    def starting(*arguments):
        if failures:
            raise failures.pop()
        return start(*arguments)

    monkeypatch.setattr(pool, "Worker", starting)
    assert set(play(("sleep", 0)).results) == {0}
    failures += [OSError("no memory")] * STARTS
    with pytest.raises(WorkerError, match="no memory"):
        play(("sleep", 0))


SCRIPT = """
    import sys
    from pathlib import Path
    from deepenc.processes.pool import Jobs, Pool

    class Double:
        def __call__(self):
            return lambda message, tell: 2 * message

    class One(Jobs):
        given = False

        def next(self, slot):
            given, self.given = self.given, True
            return None if given else 21

        def left(self):
            return not self.given

        def done(self, job, result):
            print("result", result)

        def lost(self, job, reason):
            print(reason)

    with Pool(Double(), 1, Path(sys.argv[1])) as pool:
        pool.run(One())
"""


@pytest.mark.parametrize("how", ["script", "standard input"])
def test_scripts_need_no_guard(tmp_path, how):
    text = textwrap.dedent(SCRIPT)
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, "-" if how == "standard input" else "script.py", "output.txt"]
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "result 42\n"), done.stderr
