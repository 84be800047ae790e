"""Cells and records in a database: SQLite by default, any other by its URL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from sqlalchemy import (
    Boolean,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    select,
    update,
)
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, SQLAlchemyError

from deepenc.arena.plan import Task
from deepenc.arena.record import Record
from deepenc.arena.run.leases import alive
from deepenc.errors import StoreError

SCHEMA = 1
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


class Store:
    """The cells of one run and their records.

    Args:
        target: Path of an SQLite file, or a database URL.
        create: Make the database where there is none.

    Raises:
        StoreError: It cannot be opened, is not deepenc's, or was written by a newer version.
    """

    def __init__(self, target: str | Path, *, create: bool = True) -> None:
        self._target = str(target)
        self._engine = _engine(self._target, create)
        with self._guard():
            present = set(inspect(self._engine).get_table_names())
            if present and not {"meta", "cells"} <= present:
                raise StoreError(
                    f"{self._shown} is a database, but not deepenc's: expected the tables meta and cells, "
                    f"got {sorted(present)[:5]}; choose another folder or URL"
                )
            if not present and not create:
                raise StoreError(f"{self._shown} holds no run; start one with `deepenc run`")
            with self._engine.begin() as connection:
                _tables.create_all(connection)
                if _read(connection, "schema") is None:
                    _write(connection, "schema", str(SCHEMA))
        self._check_version()

    @property
    def _shown(self) -> str:
        """The target, without a password."""
        return make_url(self._target).render_as_string() if "://" in self._target else self._target

    def _check_version(self) -> None:
        found = self.get("schema")
        if not str(found).isdigit() or int(str(found)) > SCHEMA:
            raise StoreError(
                f"{self._shown} was written by a newer deepenc (schema {found}, this one reads up to "
                f"{SCHEMA}); upgrade deepenc, or start a run in another folder"
            )

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn the database's complaints into one that names the place and a remedy."""
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreError(f"{self._shown}: {_explain(error)}") from error

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
            return _read(connection, name)

    def put(self, name: str, value: str) -> None:
        """Note a fact about the run."""
        with self._begin() as connection:
            _write(connection, name, value)

    def put_new(self, name: str, value: str) -> str:
        """Note a fact unless it is known already; gives what is known then."""
        with self._begin() as connection:
            known = _read(connection, name)
            if known is None:
                _write(connection, name, value)
            return value if known is None else known

    def experiment(self) -> dict[str, Any] | None:
        """The experiment that was run last, as plain data."""
        text = self.get("experiment")
        return None if text is None else dict(json.loads(text))

    def sync(self, tasks: Sequence[Task], experiment: dict[str, Any]) -> None:
        """Make the plan the current one: new cells are added, others keep their state and record.

        Cells that are no longer planned stay, out of the current plan.
        """
        with self._begin() as connection:
            _write(connection, "experiment", json.dumps(experiment, sort_keys=True))
            connection.execute(update(_cells).values(current=False))
            known = set(connection.scalars(select(_cells.c.id)))
            fresh = []
            for position, task in enumerate(tasks):
                if task.identity in known:
                    here = _cells.c.id == task.identity
                    connection.execute(update(_cells).where(here).values(current=True, position=position))
                else:
                    fresh.append(_row(task, position))
            if fresh:
                connection.execute(_cells.insert(), fresh)

    def recover(self) -> int:
        """Give back the cells of processes that are no more; says how many."""
        with self._begin() as connection:
            owners = connection.scalars(select(_cells.c.owner).where(_cells.c.state == "running").distinct())
            dead = [owner for owner in owners if owner is None or not alive(owner)]
            return sum(self._plan_again(connection, _cells.c.owner == owner) for owner in dead)

    def release(self, owner: str) -> int:
        """Give back the running cells of an owner; says how many."""
        with self._begin() as connection:
            return self._plan_again(connection, _cells.c.owner == owner)

    def retry_failed(self) -> int:
        """Plan the failed cells again; says how many."""
        with self._begin() as connection:
            here = (_cells.c.state == "failed") & _cells.c.current
            return connection.execute(
                update(_cells).where(here).values(state="planned", record=None, owner=None)
            ).rowcount

    @staticmethod
    def _plan_again(connection: Connection, where: Any) -> int:
        here = (_cells.c.state == "running") & where
        return connection.execute(update(_cells).where(here).values(state="planned", owner=None)).rowcount

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
                select(_cells.c.id, _cells.c.state).where(_cells.c.current).order_by(_cells.c.position)
            )
            return {row.id: row.state for row in rows}

    def records(self) -> list[Record]:
        """Records of the finished cells of the current plan, in its order."""
        with self._begin() as connection:
            texts = connection.scalars(
                select(_cells.c.record)
                .where(_cells.c.current & _cells.c.record.is_not(None))
                .order_by(_cells.c.position)
            ).all()
        try:
            return [Record.model_validate_json(text) for text in texts]
        except ValidationError as error:
            raise StoreError(
                f"{self._shown} holds a record that this deepenc cannot read ({error.error_count()} "
                "problems); was it altered, or written by another version? Start a run in another folder"
            ) from error


def _engine(target: str, create: bool) -> Engine:
    if "://" in target:
        try:
            return create_engine(target)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise StoreError(
                f"cannot use the database URL ({error}); expected sqlite:///FILE, or "
                "postgresql+psycopg://USER@HOST/NAME with its driver installed"
            ) from error
    path = Path(target)
    if not path.exists():
        if not create:
            raise StoreError(f"no run at {path}; start one with `deepenc run`, or give its folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot make the folder {path.parent}: {error.strerror}; choose a writable one"
            ) from error
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 60})

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _: Any) -> None:
        # The driver must not begin by itself, so that reading and writing are one transaction below.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _explain(error: SQLAlchemyError) -> str:
    cause = str(error.orig) if isinstance(error, DatabaseError) and error.orig else str(error)
    remedies = {
        "not a database": "the file is not a database; was it overwritten? Choose another folder",
        "malformed": "the database is damaged; restore a copy, or start a run in another folder",
        "full": "the disk is full; free some space and run again: finished cells are kept",
        "disk I/O error": "the disk cannot be written; free some space or choose another folder",
        "readonly": "the folder or the file cannot be written; change its permissions or choose another",
        "unable to open": "the file cannot be opened or made; is the folder there, and writable?",
        "locked": "another process has kept the database locked for a minute; end it and run again",
    }
    remedy = next((text for sign, text in remedies.items() if sign in cause), "check that it can be reached")
    return f"{remedy} ({cause})"


def _row(task: Task, position: int) -> dict[str, Any]:
    cell = task.cell
    return {
        "id": task.identity,
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


def _read(connection: Connection, name: str) -> str | None:
    return connection.scalar(select(_meta.c.value).where(_meta.c.name == name))


def _write(connection: Connection, name: str, value: str) -> None:
    changed = connection.execute(update(_meta).where(_meta.c.name == name).values(value=value))
    if changed.rowcount == 0:
        connection.execute(_meta.insert().values(name=name, value=value))
