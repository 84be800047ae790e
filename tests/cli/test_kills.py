"""``encrypt --force`` and ``rotate --force``, killed at any moment, leave a network and its key."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from deepenc import plugins
from deepenc.cli import app
from deepenc.cli.release import write_release
from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.keys.key import save_key
from tests.cli.test_commands import Toy

COMMANDS = {
    "encrypt": ("encrypt", "toy", "released", "--key", "owner.key", "--force"),
    "rotate": ("rotate", "first", "first.key", "released", "owner.key", "--force"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two releases and their keys; in the one that is replaced lies a file of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEEPENC_PASSPHRASE", "correct horse")
    monkeypatch.setitem(plugins._loaded, ("victim", "toy"), Toy)
    monkeypatch.setattr(save_key, "__defaults__", (None, 2**10))  # sealing as for a real key takes a second
    done("encrypt", "toy", "first", "--key", "first.key")
    done("encrypt", "toy", "released", "--key", "owner.key")
    Path("released", "README.md").write_text("mine")
    return tmp_path


ZYGOTE = """
import json, os, sys
from typer.testing import CliRunner
from deepenc import plugins
from deepenc.cli import app
from deepenc.encryption.disk.sharded import checkpoint
from deepenc.encryption.encrypt import encrypt
from deepenc.encryption.keys.key import save_key
from tests.cli.test_commands import Toy

plugins._loaded["victim", "toy"] = Toy
save_key.__defaults__ = (None, 2**10)

for line in sys.stdin:
    folder, command = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os._exit(CliRunner().invoke(app, command).exit_code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported all and computed nothing, so that commands can be forked from it."""
    command = [sys.executable, "-c", ZYGOTE]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"DEEPENC_PASSPHRASE": "correct horse", "PYTHONPATH": root},
    ) as process:
        yield process


def run(zygote: subprocess.Popen[str], command: str, after: float | None = None) -> int:
    """The exit code of a command that is killed after some seconds, unless it ends before."""
    assert zygote.stdin is not None and zygote.stdout is not None
    print(json.dumps([os.getcwd(), COMMANDS[command]]), file=zygote.stdin, flush=True)
    child = int(zygote.stdout.readline())
    if after is not None:
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return int(zygote.stdout.readline())


def done(*args: str) -> None:
    result = CliRunner().invoke(app, [*args])
    assert result.exit_code == 0, result.output


def check() -> bytes:
    """The pair opens, nothing else is lost; returns the key that it has."""
    done("decrypt", "released", "owner.key", "plain", "--force")
    model, _ = Toy().network(Path())
    found = load_file("plain")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert Path("released", "README.md").read_text() == "mine"
    assert set(os.listdir("released")) == {"README.md", "deepenc.json", "model.safetensors"}
    assert not list(Path().glob(".*.old")) and not list(Path().glob(".*.ready"))
    return Path("owner.key").read_bytes()


def test_killed_at_each_step() -> None:
    """What both commands end with, killed before each call that changes the disk, one after the other."""
    model, example = Toy().network(Path())
    encrypted, key = encrypt(model, example, "paper-samp")
    outcomes: list[bool] = []
    status = -signal.SIGKILL
    copy("released", "saved")
    copy("owner.key", "saved.key")
    while status:
        copy("saved", "released")
        copy("saved.key", "owner.key")
        child = fork()
        if not child:
            step_until(len(outcomes) + 1)
            write_release(
                Path("released"), encrypted, key, Path("owner.key"), victim=model.state_dict(),
                openings=("correct horse", []), source={"name": "toy"}, factory=None, defense={}, force=True,
            )  # fmt: skip
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (-signal.SIGKILL, 0)
        outcomes.append(check() != Path("saved.key").read_bytes())
    assert len(outcomes) > 15, "there are that many steps"
    assert outcomes == sorted(outcomes), "up to one step the old ones are there, then the new ones"
    assert 5 < sum(outcomes) < len(outcomes) - 5
    copy("saved.key", ".owner.key.new")
    Path(".released.partial").mkdir()
    done(*COMMANDS["encrypt"])
    assert not list(Path().glob(".*")), "what killed commands left goes with the next"


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not need
        return os.fork()


def step_until(fatal: int) -> None:
    """Kill this process before the ``fatal``-th call that changes the disk."""
    left = fatal

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def stepped(*args: object, **more: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return stepped

    for step in ("replace", "unlink", "fsync", "mkdir", "rmdir", "rename"):
        setattr(os, step, counted(getattr(os, step)))


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments(zygote: subprocess.Popen[str], command: str) -> None:
    started = time.perf_counter()
    assert run(zygote, command) == 0
    lasts, rng, kills = time.perf_counter() - started, random.Random(7), 0
    while kills < 60:
        kills += run(zygote, command, after=rng.uniform(0, lasts)) < 0
        check()
    assert run(zygote, command) == 0
    check()
    assert not list(Path().glob(".*"))


def copy(source: str, target: str) -> None:
    if Path(source).is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
