"""Cells and records in a database: SQLite by default, any other by its URL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ValidationError
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    bindparam,
    delete,
    func,
    inspect,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from deepenc.arena.plan import Duel
from deepenc.arena.record import Record, State
from deepenc.arena.run.database import clock, explain, open_engine, shown
from deepenc.errors import ConfigError, StoreError
from deepenc.seeds import Roots, random_root

SCHEMA = 2
TIMEOUT = "stopped at the run's time limit"
"""How the reason of a cell begins that took longer than the run allowed, whatever its threat model allows."""

_STATES = frozenset(get_args(State))
_tables = MetaData()
_meta = Table("meta", _tables, Column("name", String(64), primary_key=True), Column("value", Text))
_cells = Table(
    "cells",
    _tables,
    Column("id", String(64), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("current", Boolean, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("victim", Text, nullable=False),
    Column("defense", Text, nullable=False),
    Column("attack", Text, nullable=False),
    Column("threat", Text, nullable=False),
    Column("key", Integer, nullable=False),
    Column("repeat", Integer, nullable=False),
    Column("owner", Text),
    Column("record", Text),
)
_leases = Table(
    "leases",
    _tables,
    Column("owner", String(64), primary_key=True),
    Column("until", Float, nullable=False),
    Column("seconds", Float, nullable=False),
)


class Store:
    """The cells of one run, their records, and the leases of those who run them.

    Args:
        target: Path of an SQLite file, or a database URL.
        create: Make the database where there is none.

    Raises:
        StoreError: It cannot be opened, is not deepenc's, or was written by a newer version.
    """

    def __init__(self, target: str | Path, *, create: bool = True) -> None:
        self._engine = open_engine(str(target), create=create)
        self._shown = shown(str(target))
        self._now = clock(self._engine)
        with self._guard():
            present = set(inspect(self._engine).get_table_names())
            if present and not {"meta", "cells"} <= present:
                raise StoreError(
                    f"{self._shown} is a database, but not deepenc's: expected the tables meta and cells, "
                    f"got {sorted(present)[:5]}; choose another folder or URL"
                )
            if not present and not create:
                raise StoreError(f"{self._shown} holds no run; start one with `deepenc run`")
            if create:
                _make_tables(self._engine)
                self.put_new("schema", str(SCHEMA))
        self._check_version()

    def _check_version(self) -> None:
        found = str(self.get("schema"))
        if not re.fullmatch("[0-9]{1,9}", found) or int(found) > SCHEMA:
            raise StoreError(
                f"{self._shown} was written by a newer deepenc (schema {found}, this one reads up to "
                f"{SCHEMA}); upgrade deepenc, or start a run in another folder"
            )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn complaints of the database, or about what it holds, into one with the place and a remedy."""
        try:
            yield
        except (SQLAlchemyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(f"{self._shown}: {explain(error)}") from error

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self._guard(), self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, name: str) -> str | None:
        """A fact about the run, or None."""
        with self._begin() as connection:
            return connection.scalar(select(_meta.c.value).where(_meta.c.name == name))

    def put(self, name: str, value: str) -> None:
        """Note a fact about the run."""
        with self._begin() as connection:
            _put(connection, name, value)

    def put_new(self, name: str, value: str) -> str:
        """Note a fact unless it is known already; gives what is known then."""
        with self._begin() as connection:
            _insert_new(connection, _meta, [{"name": name, "value": value}])
            return str(connection.scalar(select(_meta.c.value).where(_meta.c.name == name)))

    def roots(self) -> Roots:
        """From which the run's keys and seeds are derived: drawn once, then kept."""
        try:
            return Roots.fromhex(self.put_new("root", random_root()))
        except ConfigError as error:
            raise StoreError(
                f"{self._shown}: the root of the run's keys is damaged; restore a copy, or start a run in "
                "another folder"
            ) from error

    def experiment(self) -> dict[str, Any] | None:
        """The experiment that was run last, as plain data."""
        text = self.get("experiment")
        with self._guard():
            return None if text is None else dict(json.loads(text))

    def sync(self, duels: Sequence[Duel], experiment: dict[str, Any]) -> None:
        """Make the plan the current one: new cells are added, others keep their state and record.

        Cells that are no longer planned stay, out of the current plan.
        """
        place = update(_cells).where(_cells.c.id == bindparam("cell"))
        place = place.values(current=True, position=bindparam("place"))
        with self._begin() as connection:
            _put(connection, "experiment", json.dumps(experiment, sort_keys=True))
            connection.execute(update(_cells).values(current=False))
            if duels:
                _insert_new(connection, _cells, [_row(duel, n) for n, duel in enumerate(duels)])
                places = [{"cell": duel.identity, "place": n} for n, duel in enumerate(duels)]
                connection.execute(place, places)

    def renew(self, owner: str, seconds: float) -> None:
        """Make an owner's lease good for so many seconds from now."""
        mine = _leases.c.owner == owner
        with self._begin() as connection:
            _insert_new(connection, _leases, [{"owner": owner, "until": 0.0, "seconds": seconds}])
            connection.execute(update(_leases).where(mine).values(until=self._now + seconds, seconds=seconds))

    def others(self, owner: str) -> dict[str, float]:
        """Who else runs cells of the current plan, and until when their leases are good."""
        with self._begin() as connection:
            rows = connection.execute(
                select(_leases.c.owner, _leases.c.until)
                .join(_cells, _cells.c.owner == _leases.c.owner)
                .where((_cells.c.state == "running") & _cells.c.current & (_cells.c.owner != owner))
                .distinct()
            )
            return {str(row.owner): float(row.until) for row in rows}

    def recover(self, owner: str = "") -> int:
        """Plan the cells again whose owner's lease has run out, this one's excepted; says how many."""
        left = _leases.c.until - self._now
        # A lease that is good for longer than leases are was given by a clock that was wrong.
        good = (left > 0) & (left <= 2 * _leases.c.seconds)
        held = select(_leases.c.owner).where((_leases.c.owner == _cells.c.owner) & good).exists()
        lost = _cells.c.owner.is_(None) | ((_cells.c.owner != owner) & ~held)
        with self._begin() as connection:
            return _plan_again(connection, (_cells.c.state == "running") & lost)

    def release(self, owner: str) -> int:
        """Plan the running cells of an owner again, and end its lease; says how many."""
        with self._begin() as connection:
            connection.execute(delete(_leases).where(_leases.c.owner == owner))
            return _plan_again(connection, (_cells.c.state == "running") & (_cells.c.owner == owner))

    def retry_failed(self) -> int:
        """Plan the failed cells again, and those that took longer than the run allowed; says how many."""
        timed_out = (_cells.c.state == "out_of_budget") & _cells.c.record.contains(f'"reason":"{TIMEOUT}')
        with self._begin() as connection:
            return _plan_again(connection, _cells.c.current & ((_cells.c.state == "failed") | timed_out))

    def claim(self, identity: str, owner: str) -> bool:
        """Take a planned cell, in one atomic step; False where somebody else was first."""
        here = (_cells.c.id == identity) & (_cells.c.state == "planned")
        with self._begin() as connection:
            changed = connection.execute(update(_cells).where(here).values(state="running", owner=owner))
            return changed.rowcount == 1

    def finish(self, record: Record, owner: str) -> bool:
        """Store a record and its state in one transaction.

        Returns:
            False where the cell is not this owner's any more; nothing is stored then.
        """
        here = (_cells.c.id == record.cell) & (_cells.c.state == "running") & (_cells.c.owner == owner)
        values = {"state": record.state, "record": record.model_dump_json(), "owner": None}
        with self._begin() as connection:
            return connection.execute(update(_cells).where(here).values(**values)).rowcount == 1

    def states(self) -> dict[str, str]:
        """State of every cell of the current plan, by identity, in the plan's order."""
        with self._begin() as connection:
            rows = connection.execute(
                select(_cells.c.id, _cells.c.state, _cells.c.record.is_(None).label("bare"))
                .where(_cells.c.current)
                .order_by(_cells.c.position)
            ).all()
        for row in rows:
            if row.state not in _STATES or bool(row.bare) != (row.state in ("planned", "running")):
                raise StoreError(
                    f"{self._shown} is damaged: cell {str(row.id)[:12]} is {row.state!r} "
                    f"{'without' if row.bare else 'with'} a record; restore a copy, or start a run in "
                    "another folder"
                )
        return {row.id: row.state for row in rows}

    def planned(self) -> int:
        """Cells of the current plan that nobody has taken."""
        with self._begin() as connection:
            free = select(func.count()).where(_cells.c.current & (_cells.c.state == "planned"))
            return int(connection.scalar(free) or 0)

    def kept(self) -> int:
        """Finished cells that are not of the current plan."""
        with self._begin() as connection:
            others = select(func.count()).where(~_cells.c.current & _cells.c.record.is_not(None))
            return int(connection.scalar(others) or 0)

    def records(self) -> list[Record]:
        """Records of the finished cells of the current plan, in its order."""
        with self._begin() as connection:
            rows = connection.execute(
                select(_cells.c.id, _cells.c.state, _cells.c.record)
                .where(_cells.c.current & _cells.c.record.is_not(None))
                .order_by(_cells.c.position)
            ).all()
        try:
            records = [Record.model_validate_json(row.record) for row in rows]
        except (ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._unreadable() from error
        if any(
            (record.cell, record.state) != (row.id, row.state)
            for record, row in zip(records, rows, strict=True)
        ):
            raise self._unreadable()
        return records

    def _unreadable(self) -> StoreError:
        return StoreError(
            f"{self._shown} holds a record that this deepenc cannot read; was it altered, or written by "
            "another version? Start a run in another folder"
        )


def _make_tables(engine: Engine) -> None:
    try:
        _tables.create_all(engine)
    except (ProgrammingError, IntegrityError):  # another run made them at the same moment
        _tables.create_all(engine)


def _row(duel: Duel, position: int) -> dict[str, Any]:
    cell = duel.cell
    return {
        "id": duel.identity,
        "position": position,
        "current": True,
        "state": "planned",
        "victim": cell.victim.label,
        "defense": cell.defense.name,
        "attack": cell.entry.label,
        "threat": cell.threat.name,
        "key": cell.key,
        "repeat": cell.repeat,
    }


def _put(connection: Connection, name: str, value: str) -> None:
    _insert_new(connection, _meta, [{"name": name, "value": value}])
    connection.execute(update(_meta).where(_meta.c.name == name).values(value=value))


def _insert_new(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert the rows whose key is not there yet."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    connection.execute(insert(table).on_conflict_do_nothing(), rows)


def _plan_again(connection: Connection, where: ColumnElement[bool]) -> int:
    again = update(_cells).where(where).values(state="planned", record=None, owner=None)
    return connection.execute(again).rowcount
