"""Searches from end to end on a tiny network: ended, resumed, killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepenc.arena.build import Encryption, Subject, fresh
from deepenc.config import load
from deepenc.encryption.defense import Defense
from deepenc.errors import ConfigError, StoreError
from deepenc.plugins import _loaded, load_file
from deepenc.study.outcome import importances, write
from deepenc.study.owners import new_owner, retire
from deepenc.study.search import Search
from deepenc.study.storage import JOURNAL, locked, open_study
from deepenc.study.trials import Evaluator, Result
from deepenc.study.tuning import Tuned, tune
from deepenc.study.workers import Progress, TrialQueue

PLUGIN = '''
import json, os, signal, time
from pathlib import Path
from typing import ClassVar
import torch
from deepenc.arena.case import Attack, Claim
from deepenc.arena.checks.tiny import TinySource
from deepenc.victims.victim import VictimSource


class Tiny(TinySource):
    """The tiny network, for worker processes."""

    name: ClassVar[str] = "tiny-of-study"


class Noting(Attack):
    """Writes down every duel it fights."""

    name: ClassVar[str] = "noting"
    log: str
    kill_once: str = ""
    fails_above: float = 1.0
    pause: float = 0.0

    def attack(self, case):
        proportion = case.defense["placement"]["proportion"]
        self.note("start", case)
        if self.kill_once and not os.path.exists(self.kill_once):
            Path(self.kill_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        if proportion > self.fails_above:
            raise RuntimeError("planted failure")
        self.note("end", case)
        return Claim(scores={s.name: torch.rand(s.width, generator=case.generator()) for s in case.sites})

    def note(self, what, case):
        with open(self.log, "a") as file:
            file.write(what + " " + json.dumps(case.defense["placement"]["proportion"]) + "\\n")
'''

SCRIPT = """
import json, sys
from deepenc.plugins import load_file
from deepenc.study.search import Search
from deepenc.study.tuning import tune

if __name__ == "__main__":
    folder, plugin, fields = sys.argv[1:]
    load_file(plugin)
    tune(Search.model_validate(json.loads(fields)), folder, cache=folder, plugin_files=[plugin])
"""

SPACE = {"placement.proportion": [0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1], "weights": ["samp"]}


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.getbasetemp() / "noting.py"
    if not path.exists():
        path.write_text(PLUGIN)
    load_file(path)
    yield path
    _loaded.pop(("victim", "tiny-of-study"), None)
    _loaded.pop(("attack", "noting"), None)


def fields(folder: Path, noting: dict[str, object] | None = None, **more: object) -> dict[str, object]:
    attack = {"name": "noting", "log": str(folder / "log")} | (noting or {})
    return {
        "name": "s",
        "victim": "tiny-of-study",
        "space": SPACE,
        "attacks": [attack],
        "objectives": ["damage-per-memory"],
        "trials": 4,
        "keys": 1,
        "fresh_keys": 1,
        "against": [],
        "pruning": False,
        "seed": 1,
    } | more


def run(folder: Path, workers: int = 1, **more: object) -> Tuned:
    search = Search.model_validate(fields(folder, **more))
    return tune(search, folder, cache=folder, workers=workers, plugin_files=[folder.parent / "noting.py"])


def fought(folder: Path, what: str = "start") -> Counter[str]:
    """Duels of the search by proportion; those on fresh keys are told apart by coming after it."""
    path = folder / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(line.split()[1] for line in lines if line.startswith(what))


def proportions(tuned: Tuned) -> list[float]:
    return [trial.params["placement.proportion"] for trial in tuned.study.get_trials(deepcopy=False)]


def states(tuned: Tuned) -> list[str]:
    return [trial.state.name for trial in tuned.study.get_trials(deepcopy=False)]


def test_a_search_ends_goes_on_and_tries_nothing_twice(plugin: Path, tmp_path: Path) -> None:
    first = run(tmp_path)
    assert states(first) == ["COMPLETE"] * 4 and first.fought == 4
    assert proportions(first)[0] == 0.05, "the base comes first"
    (best,) = first.finalists
    values = [trial.values[0] for trial in first.study.get_trials()]
    assert best.trial == values.index(max(values))
    assert best.searched[0] is not None and best.searched[0].mean == pytest.approx(max(values))
    assert best.fresh[0] is not None and best.fresh[0].keys == 1
    assert best.fresh[0].interval is not None and best.fresh[0].interval.method == "examples"

    tried = proportions(first)
    again = run(tmp_path)
    assert again.fought == 0 and proportions(again) == tried

    more = run(tmp_path, trials=20)  # there are only 8 points
    assert sorted(proportions(more)) == SPACE["placement.proportion"]
    assert proportions(more)[:4] == tried and more.fought == 4

    search = Search.model_validate(fields(tmp_path, trials=20))
    written = write(search, more.study, [best.defense], tmp_path)
    assert all(path.stat().st_size > 0 for path in written) and len(written) >= 2
    loaded = load(written[0])
    assert loaded.defenses == (best.defense,) and loaded.seed is None
    assert importances(more.study).get("damage-per-memory", {"placement.proportion": 0}).keys() >= {
        "placement.proportion"
    }

    with pytest.raises(ConfigError, match="space differ"):
        run(tmp_path, space={"placement.proportion": [0.03, 0.05]})
    stored = more.study.user_attrs["search"]
    older = {field: value for field, value in stored.items() if field != "form"}
    more.study.set_user_attr("search", older)
    with pytest.raises(ConfigError, match="form differ"):
        run(tmp_path)


def test_failed_is_failed_and_too_dear_is_pruned(plugin: Path, tmp_path: Path) -> None:
    tuned = run(tmp_path, noting={"fails_above": 0.045}, memory=0.15, trials=8)
    for trial in tuned.study.get_trials(deepcopy=False):
        proportion = trial.params["placement.proportion"]
        dear = "more than the 15.00%" in trial.user_attrs["reason"]
        failed = "planted failure" in trial.user_attrs["reason"]
        expected = "PRUNED" if dear else "FAIL" if proportion > 0.045 else "COMPLETE"
        assert trial.state.name == expected and failed == (expected == "FAIL")
        if trial.state.name == "PRUNED":
            assert proportion not in map(float, fought(tmp_path))
    assert set(states(tuned)) == {"COMPLETE", "FAIL", "PRUNED"}
    with pytest.raises(ConfigError, match="planted failure"):
        run(tmp_path, noting={"fails_above": 0.0}, name="none")


def test_gain_is_equation_1_of_what_is_asked_for(plugin: Path, tmp_path: Path) -> None:
    asked = {"objectives": ["gain"], "lam": 0.5, "measure": "probabilities", "form": "relative", "trials": 2}
    search = Search.model_validate(fields(tmp_path, **asked))
    secret = bytes(range(32))
    (found,) = Evaluator(search, tmp_path, secret).fresh_responses(search.base, [secret])
    subject = search.victim.load(tmp_path)
    encryption = Encryption.of(Subject.of(subject), search.base, secret)
    network, images = fresh(encryption, torch.device("cpu")), subject.judge.inputs
    with torch.no_grad():
        before, after = (net(images).double().softmax(1) for net in (subject.model, network))
    assert found == pytest.approx(float((after - before).square().sum() / before.square().sum()))

    tuned = run(tmp_path, **asked)
    (best,) = tuned.finalists
    assert best.fresh[0] is not None and best.memory is not None
    assert best.fresh[0].mean + 0.5 * best.memory.mean > 0

    moved = Defense.of({"base": "paper-samp", "name": "moved", "hardening": ["permute"]})
    inside = Evaluator(search.model_copy(update={"measure": "features"}), tmp_path, secret)
    with pytest.raises(ConfigError, match="arranges them otherwise"):
        inside.fresh_responses(moved, [secret])


def test_a_front_of_several_objectives(plugin: Path, tmp_path: Path) -> None:
    objectives = ["damage", "memory", "detectability"]
    tuned = run(tmp_path, objectives=objectives, trials=5, finalists=2)
    assert 1 <= len(tuned.finalists) <= 2
    assert len(set(proportions(tuned))) == 5
    for one in tuned.finalists:
        assert all(value is not None for value in (*one.searched, *one.fresh))
    values = [trial.values for trial in tuned.study.get_trials()]
    front = [
        a
        for a in values
        if not any(b != a and b[0] >= a[0] and b[1] <= a[1] and b[2] <= a[2] for b in values)
    ]
    assert sorted(t.values for t in tuned.study.best_trials) == sorted(front)


def test_one_command_at_a_time(plugin: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(StoreError, match="another command"):
        run(tmp_path)


def test_a_trial_that_kills_its_workers_has_failed(plugin: Path, tmp_path: Path) -> None:
    search = Search.model_validate(fields(tmp_path, trials=2))
    queue = TrialQueue(search, open_study(search, tmp_path), "here", None, Progress())
    first, second = queue.next(), queue.next()
    assert first is not None and second is not None and not queue.left()
    queue.lost(first, "the worker process died 2 times (SIGKILL)")
    queue.done(second, Result("complete", (1.0,)))
    trials = queue.study.get_trials()
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE"] and queue.fought == 2
    assert "died 2 times" in trials[0].user_attrs["reason"]


def test_a_trial_whose_command_died_goes_on_under_its_number(plugin: Path, tmp_path: Path) -> None:
    search = Search.model_validate(fields(tmp_path))
    study = open_study(search, tmp_path)
    begun = []
    mine = new_owner()
    for owner in (f"{socket.gethostname()}|{os.getpid()}|0|dead", mine):
        trial = study.ask()
        trial.set_user_attr("owner", owner)
        begun.append({axis.field: axis.suggest(trial) for axis in search.space})
        trial.report(1.0, 0)
    queue = TrialQueue(search, open_study(search, tmp_path), "here", "host|1|2|x", Progress())
    retire(mine)
    (orphan, values), (other, further) = queue.next() or ((), ()), queue.next() or ((), ())
    assert (orphan.number, values) == (0, begun[0]), "the one whose owner is dead"
    assert other.number == 2 and further not in begun
    queue.prune(orphan, 0, 5.0)  # was reported before
    queue.close(orphan, Result("complete", (2.0,)))
    assert [t.state.name for t in queue.study.get_trials()] == ["COMPLETE", "RUNNING", "RUNNING"]
    assert queue.study.get_trials()[0].intermediate_values == {0: 1.0}


def test_a_killed_worker_loses_no_trial_and_doubles_none(plugin: Path, tmp_path: Path) -> None:
    tuned = run(tmp_path, workers=2, noting={"kill_once": str(tmp_path / "killed")}, trials=3)
    assert (tmp_path / "killed").exists()
    assert states(tuned) == ["COMPLETE"] * 3 and tuned.fought == 3
    assert len(set(proportions(tuned))) == 3
    assert sum(fought(tmp_path).values()) == 3 + 1 + 1, "one killed and fought again, one on a fresh key"
    assert sum(fought(tmp_path, "end").values()) == 3 + 1


def test_a_killed_command_goes_on_where_it_was(plugin: Path, tmp_path: Path) -> None:
    slow = fields(tmp_path, {"pause": 0.5})
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), str(plugin), json.dumps(slow)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while sum(fought(tmp_path).values()) < 2:  # the first trial is over, the second is being fought
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    search = Search.model_validate(slow)
    before = open_study(search, tmp_path).get_trials()
    assert [trial.state.name for trial in before] == ["COMPLETE", "RUNNING"]
    tuned = run(tmp_path, noting={"pause": 0.5})
    assert states(tuned) == ["COMPLETE"] * 4 and tuned.fought == 3
    after = tuned.study.get_trials()
    assert after[0] == before[0] and after[1].params == before[1].params
    assert len(set(proportions(tuned))) == 4
    assert (tmp_path / JOURNAL).exists()


def test_the_package_does_not_load_optuna() -> None:
    code = (
        "import sys, deepenc, deepenc.study.tuning, deepenc.study.workers; print('optuna' in sys.modules, "
        "'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
