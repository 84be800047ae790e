"""Who runs a cell: leases that are renewed, run out, and are taken over."""

import sqlite3
import time

import pytest

from deepenc.arena.checks.tiny import TinySource, host_defense
from deepenc.arena.entry import Entry
from deepenc.arena.plan import Cell, Duel
from deepenc.arena.run.leases import Lease
from deepenc.arena.run.store import Store
from deepenc.arena.threat import Threat
from deepenc.seeds import Roots


def duels(count):
    entry, threat = Entry.model_validate("null"), Threat(name="t")
    cells = [Cell(TinySource(), host_defense(), entry, threat, key, 0) for key in range(count)]
    return [Duel.of(cell, "victim", Roots.of(bytes(32)), None, "cpu") for cell in cells]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run.sqlite") as store:
        store.sync(duels(2), {})
        yield store


def until(store, owner, moment):
    """Set when a lease runs out, as another host's clock would have."""
    with store._begin() as connection:
        connection.exec_driver_sql("update leases set until = ? where owner = ?", (moment, owner))


def test_a_lease_that_has_run_out_is_taken_over_and_the_late_result_refused(store):
    first, second = duels(2)
    store.renew("old", 0.3)
    store.renew("new", 60)
    store.claim(first.identity, "old")
    store.claim(second.identity, "new")
    assert store.recover("new") == 0, "both leases are good"
    time.sleep(0.4)
    assert store.recover("new") == 1
    assert store.claim(first.identity, "new")
    assert not store.finish(first.record(state="done"), "old"), "the old owner's result comes too late"
    assert store.finish(first.record(state="done"), "new")
    assert list(store.states().values()) == ["done", "running"]


def test_a_result_is_welcome_while_nobody_has_taken_over(store):
    duel = duels(1)[0]
    store.renew("slow", 0.01)
    store.claim(duel.identity, "slow")
    time.sleep(0.1)
    assert store.finish(duel.record(state="done"), "slow")


def test_a_run_does_not_take_its_own_cells_for_lost(store):
    duel = duels(1)[0]
    store.claim(duel.identity, "mine")
    store.renew("mine", 0.01)
    time.sleep(0.1)
    assert store.recover("mine") == 0
    assert store.recover("another") == 1


def test_a_lease_is_renewed_while_it_is_held(store):
    with Lease(store, 0.6) as lease:
        store.claim(duels(1)[0].identity, lease.owner)
        began = store.others("")[lease.owner]
        time.sleep(1.5)
        assert store.recover("another") == 0
        assert store.others("")[lease.owner] >= began + 0.8
    assert set(store.states().values()) == {"planned"} and not store.others("")


def test_a_lease_from_a_clock_that_was_years_ahead_does_not_hold(store):
    duel = duels(1)[0]
    store.renew("future", 45)
    store.claim(duel.identity, "future")
    until(store, "future", time.time() + 11 * 365 * 86400)
    assert store.recover("another") == 1


def test_two_runs_have_two_names(store):
    assert Lease(store).owner != Lease(store).owner


def test_the_clock_is_the_database_s(store, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store.renew("me", 45)
    with sqlite3.connect(store._engine.url.database) as connection:
        (moment,) = connection.execute("select until - unixepoch('now') from leases").fetchone()
    connection.close()
    assert 43 < moment < 47
