"""The database: what it refuses, and that a cell belongs to one."""

import os
import sqlite3
import stat
import subprocess
import sys

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.plan import Cell, Entry, Task
from deepenc.arena.record import Record
from deepenc.arena.run.leases import alive, new_owner, retire
from deepenc.arena.run.store import Store
from deepenc.arena.threat import Threat
from deepenc.errors import StoreError
from deepenc.seeds import Roots


def tasks(count):
    entry, threat = Entry.model_validate("null"), Threat(name="t")
    cells = [Cell(TinySource(), host_defense(), entry, threat, key, 0) for key in range(count)]
    return [Task.of(cell, "victim", Roots.of(bytes(32)), None, "cpu") for cell in cells]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run.sqlite") as store:
        store.sync(tasks(3), {"name": "x"})
        yield store


def done(task):
    return task.record(state="done")


def test_a_cell_is_claimed_once(store):
    identity = tasks(1)[0].identity
    assert store.claim(identity, "a")
    assert not store.claim(identity, "b")
    assert store.states()[identity] == "running"


def test_only_its_owner_finishes_a_cell_and_only_once(store):
    task = tasks(1)[0]
    store.claim(task.identity, "a")
    assert not store.finish(done(task), "b")
    assert store.finish(done(task), "a")
    assert not store.finish(done(task), "a")
    assert store.records() == [done(task)]
    assert not store.claim(task.identity, "a")


def test_a_new_plan_keeps_what_matches(store):
    first, second, third = tasks(3)
    store.claim(first.identity, "a")
    store.finish(done(first), "a")
    store.claim(third.identity, "a")
    store.finish(done(third), "a")
    store.sync([*tasks(5)[3:], first], {"name": "y"})
    assert list(store.states().values()) == ["planned", "planned", "done"]
    assert [r.cell for r in store.records()] == [first.identity]
    store.sync([first, second, third], {"name": "x"})
    assert list(store.states().values()) == ["done", "planned", "done"]
    assert store.experiment() == {"name": "x"}


def test_failed_cells_are_planned_again_on_demand(store):
    task = tasks(1)[0]
    store.claim(task.identity, "a")
    store.finish(task.record(state="failed", reason="x"), "a")
    assert store.retry_failed() == 1
    assert store.records() == []
    assert store.claim(task.identity, "a")


def test_cells_of_dead_processes_are_given_back(store):
    code = "from deepenc.arena.run.leases import new_owner; print(new_owner())"
    dead = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    mine, other = new_owner(), tasks(3)
    for task, owner in zip(other, (dead, mine, "elsewhere|1|2|3"), strict=True):
        assert store.claim(task.identity, owner)
    assert not alive(dead)
    assert store.recover() == 1
    assert list(store.states().values()) == ["planned", "running", "running"]
    retire(mine)
    assert store.recover() == 1
    assert store.release("elsewhere|1|2|3") == 1


def test_a_reused_process_number_is_another_process():
    host, _, _, mark = new_owner().split("|")
    assert not alive("|".join([host, str(os.getppid()), "12345", mark]))


def test_a_newer_database(tmp_path):
    path = tmp_path / "run.sqlite"
    with Store(path) as store:
        store.put("schema", "2")
    with pytest.raises(StoreError, match=r"newer.*upgrade"):
        Store(path)


def test_another_database(tmp_path):
    path = tmp_path / "run.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table songs (name text)")
    connection.close()
    with pytest.raises(StoreError, match=r"not deepenc's.*songs"):
        Store(path)


def test_not_a_database(tmp_path):
    path = tmp_path / "run.sqlite"
    path.write_bytes(b"no database at all, but long enough to look like one" * 50)
    with pytest.raises(StoreError, match="not a database"):
        Store(path)
    assert path.read_bytes().startswith(b"no database")


def test_nothing_there(tmp_path):
    with pytest.raises(StoreError, match="no run at"):
        Store(tmp_path / "run.sqlite", create=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        Store(tmp_path / "file" / "run" / "run.sqlite")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StoreError, match="writable"):
        Store(tmp_path / "run.sqlite")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    path = tmp_path / "run.sqlite"
    with Store(path) as store:
        store.sync(tasks(1), {})
        task = tasks(1)[0]
        store.claim(task.identity, "a")
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("pragma page_count").scalar()
            connection.exec_driver_sql(f"pragma max_page_count={pages}")
            connection.rollback()
        with pytest.raises(StoreError, match="disk is full"):
            store.finish(task.record(state="failed", reason="x" * 100_000), "a")
        assert list(store.states().values()) == ["running"]


@pytest.mark.parametrize("url", ["nosuch://x", "://"])
def test_a_url_that_cannot_be_used(url):
    with pytest.raises(StoreError, match="expected sqlite"):
        Store(url)


def test_a_record_of_another_version(store, tmp_path):
    task = tasks(1)[0]
    store.claim(task.identity, "a")
    store.finish(done(task), "a")
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute("update cells set record = replace(record, '\"version\":2', '\"version\":9')")
    connection.close()
    with pytest.raises(StoreError, match="cannot read"):
        store.records()


def test_records_come_back_equal(store):
    task = tasks(1)[0]
    store.claim(task.identity, "a")
    record = task.record(state="done", memory=0.1 + 0.2, key_bits=1e-17)
    store.finish(record, "a")
    assert store.records() == [record]
    assert isinstance(store.records()[0], Record)
