"""What code leaves behind in the process is put back, or told."""

import logging
import os
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepenc.arena import duel
from deepenc.processes.residue import Surroundings, residue

LEFT = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "torch's threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "small numbers": lambda: torch.set_flush_denormal(True),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast on cpu": lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__(),
    "autocast around": lambda: torch.autocast_increment_nesting(),
    "_global_forward_hooks": lambda: register_module_forward_hook(lambda *_: None),
    "_global_optimizer_pre_hooks": lambda: register_optimizer_step_pre_hook(lambda *_: None),
    "a mode of torch's": lambda: TorchFunctionMode().__enter__(),
    "mode of torch": lambda: TorchDispatchMode().__enter__(),
    "numpy's error": lambda: np.seterr(all="raise"),
    "warnings": lambda: warnings.simplefilter("ignore"),
    "recursion": lambda: sys.setrecursionlimit(777),
    "sys.path": lambda: sys.path.append("nowhere"),
    "environment": lambda: os.environ.update(LEFT_BEHIND="1"),
    "working directory": lambda: os.chdir("/"),
    "signals": lambda: signal.signal(signal.SIGUSR1, lambda *_: None),
    "alarm": lambda: signal.alarm(30),
    "logging": lambda: logging.disable(logging.CRITICAL),
    "stdout": lambda: setattr(sys, "stdout", None),
}


@pytest.mark.parametrize("name", LEFT)
def test_settings_are_put_back(name):
    before = Surroundings()
    LEFT[name]()
    told = before.restore()
    assert any(name in what for what in told), told
    assert residue() is None
    assert Surroundings().restore() == []
    assert F.relu(torch.ones(2)).dtype == torch.float32 and signal.alarm(0) == 0


def test_numbers_are_what_they_were():
    network, images = torch.nn.Linear(8, 8), torch.randn(4, 8)
    expected = network(images)
    before = Surroundings()
    for name in ("autocast on cpu", "_global_forward_hooks", "default dtype", "grad mode"):
        LEFT[name]()
    register_module_forward_hook(lambda *_: torch.zeros(1))
    before.restore()
    assert torch.equal(network(images), expected) and network(images).requires_grad


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (F, "batch_norm"),
        (duel, "judge"),
        (torch.Tensor, "argsort"),
        (torch.nn.Linear, "forward"),
        (torch, "add"),
    ],
)
def test_replaced_functions_are_put_back_and_spoil_the_process(place, name):
    original = getattr(place, name)
    before = Surroundings()
    setattr(place, name, lambda *_: None)
    told = before.restore()
    assert getattr(place, name) == original
    assert told == [f"another {place.__name__}.{name}"] and residue() == told[0]
    assert Surroundings().restore() == [] and residue() is None


def test_torch_may_wrap_its_own_functions():
    before = Surroundings()

    class Own(torch.optim.SGD):
        pass

    for kind in (Own, torch.optim.Adagrad):
        kind([torch.ones(1, requires_grad=True)], lr=1.0).step()
    assert before.restore() == []


def test_what_runs_on_spoils_the_process():
    before, end = Surroundings(), threading.Event()
    thread = threading.Thread(target=end.wait, name="left")
    thread.start()
    assert before.restore() == ["the thread 'left', which runs on"] and "left" in residue()
    end.set()
    thread.join()
    before = Surroundings()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    told = before.restore()
    child.communicate()
    if sys.platform == "linux":
        assert told == [f"processes [{child.pid}]"] == [residue()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_duel_ends():
    before = Surroundings()
    child = os.fork()
    before.restore()  # the child ends here, and nothing is judged twice
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
