"""Studies are never lost to a write that was cut off, nor stuck at a lock; damage is told in words."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from deepenc.arena.checks.tiny import TinySource
from deepenc.errors import ConfigError, StoreError
from deepenc.plugins import _loaded, register
from deepenc.study.search import Search
from deepenc.study.storage import JOURNAL, open_study
from deepenc.study.trials import Result
from deepenc.study.workers import Progress, TrialQueue


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    register(TinySource, "tests")
    yield
    _loaded.pop(("victim", "tiny"), None)


def search(**fields: object) -> Search:
    plain: dict[str, object] = {
        "name": "s",
        "victim": "tiny",
        "space": {"placement.proportion": [0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1]},
        "attacks": ["norms"],
        "objectives": ["damage-per-memory"],
        "trials": 9,
        "seed": 1,
    }
    return Search.model_validate(plain | fields)


def queue_of(folder: Path) -> TrialQueue:
    return TrialQueue(search(), open_study(search(), folder), "here", None, Progress())


def fight(folder: Path, trials: int) -> list[tuple[int, str, Any]]:
    """Go on with a study, as a search does, but without duels; what its trials are then."""
    queue = queue_of(folder)
    for _ in range(trials):
        job = queue.next()
        assert job is not None
        queue.close(job[0], Result("complete", (float(job[0].number),)))
    return trials_of(folder)


def trials_of(folder: Path) -> list[tuple[int, str, Any]]:
    trials = open_study(search(), folder).get_trials(deepcopy=False)
    return [(trial.number, trial.state.name, trial.params) for trial in trials]


def test_a_write_cut_off_anywhere_costs_nothing_that_was_stored(tmp_path: Path) -> None:
    before = fight(tmp_path, 3)
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    queue = queue_of(tmp_path)
    assert queue.next() is not None
    more = journal.read_bytes()
    for cut in {len(whole), len(whole) + 1, *range(len(whole) + 1, len(more), 61), len(more) - 1}:
        journal.write_bytes(more[:cut])
        assert trials_of(tmp_path)[:3] == before
        after = fight(tmp_path, 2)
        assert after[:3] == before and [(n, state) for n, state, _ in after[3:]] == [
            (3, "COMPLETE"),
            (4, "COMPLETE"),
        ]
        assert len({str(params) for _, _, params in after}) == 5


def test_a_line_written_behind_one_cut_off_is_removed(tmp_path: Path) -> None:
    """So earlier versions left it."""
    before = fight(tmp_path, 2)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":8,"worker_{"op_code":8,"worker_id":"x","trial_id":1}\n')
    assert trials_of(tmp_path) == before and len(fight(tmp_path, 1)) == 3


def test_a_lock_that_a_kill_left_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # from inside `run` a relative lock points nowhere
    before = fight(Path("run"), 2) if Path("run").mkdir() is None else []
    JournalFileSymlinkLock(str(Path("run") / JOURNAL)).acquire()
    assert trials_of(Path("run")) == before and len(fight(Path("run"), 1)) == 3
    assert not list(Path("run").glob("*.lock"))


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """A write that makes a file larger fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 20, 150, 400])
def test_a_full_disk_is_told_and_the_search_goes_on_when_there_is_room(tmp_path: Path, room: int) -> None:
    before = fight(tmp_path, 2)
    journal = tmp_path / JOURNAL
    with no_room_beyond(journal.stat().st_size + room), pytest.raises(StoreError, match="make room"):
        fight(tmp_path, 1)
    assert journal.read_bytes().endswith(b"\n"), "nothing half-written stays"
    assert trials_of(tmp_path)[:2] == before
    after = fight(tmp_path, 2)
    assert after[:2] == before and [state for _, state, _ in after] == ["COMPLETE"] * 4


@pytest.mark.parametrize(
    "line",
    [
        *(b"nonsense", b"", b"\0\0\0", b"\xff\xfe", b"[]", b"1", b"null", b'"text"', b"{}", b"[" * 100_000),
        *(b'{"op_code": 99}', b'{"op_code": 4}', b'{"op_code": 0, "study_name": "x", "directions": [7]}'),
        *(b'{"op_code": 4, "study_id": 0, "datetime_start": 5}', b'{"op_code": 5, "trial_id": 0}'),
        b'{"op_code": 4, "study_id": 0, "datetime_start": null, "distributions": 5, "worker_id": "x"}',
        b'{"op_code": 4, "study_id": 0, "datetime_start": null, "distributions": {"": "{"}, "worker_id": ""}',
    ],
)
def test_damage_in_the_middle_is_told_with_its_line_and_left_alone(tmp_path: Path, line: bytes) -> None:
    fight(tmp_path, 2)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    spoilt = b"".join([*lines[:5], line + b"\n", *lines[5:]])
    journal.write_bytes(spoilt)
    with pytest.raises(StoreError, match=r"line 6 is damaged.*cut it back to the 5 lines.*--out"):
        open_study(search(), tmp_path)
    assert journal.read_bytes() == spoilt


@pytest.mark.parametrize(
    "change",
    [
        {"op_code": 2, "study_id": 0, "user_attr": {"root": "zz"}},
        {"op_code": 2, "study_id": 0, "user_attr": {"root": 5}},
        {"op_code": 2, "study_id": 0, "user_attr": {"references": [{"state": "?"}]}},
        {"op_code": 8, "trial_id": 2, "user_attr": {"records": "none"}},
        {"op_code": 8, "trial_id": 2, "user_attr": {"owner": 5}},
        {"op_code": 8, "trial_id": 2, "user_attr": {"reason": []}},
        {"op_code": 7, "trial_id": 2, "step": 0, "intermediate_value": "much"},
        {"op_code": 6, "trial_id": 2, "state": 1, "values": None, "datetime_complete": "2026-01-01T00:00:00"},
        {
            "op_code": 5,
            "trial_id": 2,
            "param_name": "x",
            "param_value_internal": 0,
            "distribution": '{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2]}}',
        },
    ],
)
def test_values_of_another_form_are_told(tmp_path: Path, change: dict[str, Any]) -> None:
    fight(tmp_path, 2)
    assert queue_of(tmp_path).next() is not None
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(json.dumps({"worker_id": "other", **change}) + "\n")
    with pytest.raises((StoreError, ConfigError), match=r"study\.journal|root"):
        open_study(search(), tmp_path)


def test_a_journal_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / JOURNAL)
    with pytest.raises(StoreError, match="is not a file"):
        open_study(search(), tmp_path)


@pytest.mark.parametrize(
    "database",
    [
        *(
            "nonsense",
            "sqlite:////nosuch/x.db",
            "nosuch://x/y",
            "sqlite://host/x",
            "postgresql://u:hush@127.0.0.1:1/x",
        ),
        *("mysql://u:hush@127.0.0.1:1/x", "", "://", "sqlite:///{folder}/text.db"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, database: str) -> None:
    (tmp_path / "text.db").write_text("no database\n" * 100)
    with pytest.raises(StoreError) as caught:
        open_study(search(), tmp_path, database.format(folder=tmp_path))
    said = str(caught.value)
    assert "\n" not in said and "hush" not in said and "--database" in said


def test_a_database_keeps_a_study_as_a_journal_does(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    queue = TrialQueue(search(), open_study(search(), tmp_path, url), "here", "other|1|2|x", Progress())
    job = queue.next()
    assert job is not None
    queue.close(job[0], Result("complete", (1.0,)))
    (trial,) = open_study(search(), tmp_path, url).get_trials()
    assert trial.state.name == "COMPLETE" and not (tmp_path / JOURNAL).exists()


def test_a_command_killed_while_it_made_the_study_lost_nothing(tmp_path: Path) -> None:
    open_study(search(), tmp_path)
    journal = tmp_path / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    root = open_study(search(), tmp_path).user_attrs["root"]
    for kept in range(len(lines)):
        journal.write_bytes(b"".join(lines[:kept]))
        study = open_study(search(), tmp_path)
        assert study.user_attrs["root"] == root, "the seed's"
        assert [trial.state.name for trial in study.get_trials()] == ["WAITING"], "the base comes first, once"


def test_a_trial_whose_values_were_cut_off_gets_others_that_are_new(tmp_path: Path) -> None:
    what = search(space={"placement.proportion": [0.02, 0.03], "weights": ["samp", "init"]})

    def begun() -> tuple[TrialQueue, Any]:
        queue = TrialQueue(what, open_study(what, tmp_path), "here", None, Progress())
        return queue, queue.next()

    tried = set()
    for _ in range(4):  # of four points
        begun()
        journal = tmp_path / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:-1]))  # the last value was not stored
        queue, (trial, values) = begun()
        tried.add(str(values))
        queue.close(trial, Result("complete", (1.0,)))
    assert len(tried) == 4
