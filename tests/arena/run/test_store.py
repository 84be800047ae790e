"""The database: what it refuses, and that a cell belongs to one."""

import os
import sqlite3
import stat

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.record import Record, Score
from deepenc.arena.run.store import Store
from deepenc.arena.threat import Threat
from deepenc.errors import StoreError
from deepenc.seeds import Roots


def duels(count):
    entry, threat = Entry.model_validate("null"), Threat(name="t")
    cells = [Cell(TinySource(), host_defense(), entry, threat, key, 0) for key in range(count)]
    return [Duel.of(cell, "victim", Roots.of(bytes(32)), None, "cpu") for cell in cells]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run.sqlite") as store:
        store.sync(duels(3), {"name": "x"})
        yield store


def done(duel):
    return duel.record(state="done")


def test_a_cell_is_claimed_once(store):
    identity = duels(1)[0].identity
    assert store.claim(identity, "a")
    assert not store.claim(identity, "b")
    assert store.states()[identity] == "running"


def test_only_its_owner_finishes_a_cell_and_only_once(store):
    duel = duels(1)[0]
    store.claim(duel.identity, "a")
    assert not store.finish(done(duel), "b")
    assert store.finish(done(duel), "a")
    assert not store.finish(done(duel), "a")
    assert store.records() == [done(duel)]
    assert not store.claim(duel.identity, "a")


def test_a_new_plan_keeps_what_matches(store):
    first, second, third = duels(3)
    store.claim(first.identity, "a")
    store.finish(done(first), "a")
    store.claim(third.identity, "a")
    store.finish(done(third), "a")
    store.sync([*duels(5)[3:], first], {"name": "y"})
    assert list(store.states().values()) == ["planned", "planned", "done"]
    assert [r.cell for r in store.records()] == [first.identity]
    store.sync([first, second, third], {"name": "x"})
    assert list(store.states().values()) == ["done", "planned", "done"]
    assert store.experiment() == {"name": "x"}


def test_failed_cells_are_planned_again_on_demand(store):
    duel = duels(1)[0]
    store.claim(duel.identity, "a")
    store.finish(duel.record(state="failed", reason="x"), "a")
    assert store.retry_failed() == 1
    assert store.records() == []
    assert store.claim(duel.identity, "a")


def test_a_newer_database(tmp_path):
    path = tmp_path / "run.sqlite"
    with Store(path) as store:
        store.put("schema", "3")
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
        store.sync(duels(1), {})
        duel = duels(1)[0]
        store.claim(duel.identity, "a")
        with store._engine.connect() as connection:
            pages = connection.exec_driver_sql("pragma page_count").scalar()
            connection.exec_driver_sql(f"pragma max_page_count={pages}")
            connection.rollback()
        with pytest.raises(StoreError, match="disk is full"):
            store.finish(duel.record(state="failed", reason="x" * 100_000), "a")
        assert list(store.states().values()) == ["running"]


@pytest.mark.parametrize("url", ["nosuch://x", "://", "sqlite://x:y", "mssql+pyodbc://x/y"])
def test_a_url_that_cannot_be_used(url):
    with pytest.raises(StoreError, match="expected sqlite"):
        Store(url)


@pytest.mark.parametrize("name", ["50%", "a%20b", "what?", "a#b", "a b", "ä&mode=ro", "file:x", "a;b"])
def test_every_folder_has_a_database_of_its_own(tmp_path, name):
    with Store(tmp_path / name / "run.sqlite") as store:
        store.put("who", name)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.sqlite")] == [f"{name}/run.sqlite"]
    with Store(tmp_path / "a b" / "run.sqlite") as store:
        assert store.get("who") == (name if name == "a b" else None)


def test_the_root_of_all_keys_is_for_its_owner_only(tmp_path):
    with Store(tmp_path / "run.sqlite") as store:
        roots = store.roots()
    assert stat.S_IMODE((tmp_path / "run.sqlite").stat().st_mode) == 0o600
    with Store(tmp_path / "run.sqlite") as store:
        assert store.roots() == roots
    assert repr(duels(1)[0].secret) not in repr(duels(1)[0])


DAMAGES = {
    "root": "update meta set value = 'zz' where name = 'root'",
    "root is a number": "update meta set value = 5 where name = 'root'",
    "schema": "update meta set value = '²' where name = 'schema'",
    "experiment": "update meta set value = '[1' where name = 'experiment'",
    "state": "update cells set state = 'won' where position = 0",
    "done without a record": "update cells set record = null where position = 0",
    "planned with a record": "update cells set state = 'planned' where position = 0",
    "another cell's record": "update cells set record = replace(record, id, 'x') where position = 0",
    "another state's record": "update cells set state = 'failed' where position = 0",
    "a record that is a blob": "update cells set record = x'ff00' where position = 0",
    "a record that is a number": "update cells set record = 7 where position = 0",
    "better than all right": "update cells set record = replace(record, '\"value\":0.6', '\"value\":1.6')",
    "a huge number": "update cells set record = replace(record, '\"examples\":5', '\"examples\":1'||:zeros)",
    "text that is not UTF-8": "update cells set state = cast(x'ff' as text) where position = 0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_database_is_told(tmp_path, damage):
    path, duel = tmp_path / "run.sqlite", duels(1)[0]
    with Store(path) as store:
        store.roots()
        store.sync([duel], {"name": "x"})
        store.claim(duel.identity, "a")
        accuracy = Score(value=0.6, examples=5)
        store.finish(duel.record(state="done", score=accuracy), "a")
    with sqlite3.connect(path) as connection:
        assert connection.execute(DAMAGES[damage], {"zeros": "0" * 999}).rowcount == 1
    connection.close()
    with pytest.raises(StoreError), Store(path) as store:
        store.roots(), store.experiment(), store.states(), store.records()


@pytest.mark.parametrize("owner", ["null", "'x'", "5", "x'00ff'", "'host|abc|1|2'"])
def test_a_cell_whose_owner_makes_no_sense_is_taken_over(store, tmp_path, owner):
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute(f"update cells set state = 'running', owner = {owner} where position = 0")
    connection.close()
    assert store.recover() == 1
    assert set(store.states().values()) == {"planned"}


def test_a_name_that_no_database_takes(store):
    with pytest.raises(StoreError):
        store.put("name", "\ud800")


def test_a_record_of_another_version(store, tmp_path):
    duel = duels(1)[0]
    store.claim(duel.identity, "a")
    store.finish(done(duel), "a")
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute("update cells set record = json_set(record, '$.version', 9)")
    connection.close()
    with pytest.raises(StoreError, match="cannot read"):
        store.records()


def test_records_come_back_equal(store):
    duel = duels(1)[0]
    store.claim(duel.identity, "a")
    record = duel.record(state="done", memory=0.1 + 0.2, key_bits=1e-17)
    store.finish(record, "a")
    assert store.records() == [record]
    assert isinstance(store.records()[0], Record)


def test_a_reason_of_any_kind_is_stored(store):
    duel = duels(1)[0]
    store.claim(duel.identity, "a")
    record = duel.record(state="failed", reason="cannot read \udcff\0" + "x" * 10**6)
    assert store.finish(record, "a")
    assert store.records() == [record]
    assert record.reason.startswith("cannot read \\udcff\\x00") and len(record.reason) <= 20_000
