"""Open the database of a run: SQLite in a file, any other by its URL; say in words what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Engine, Float, create_engine, event, literal_column
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, SQLAlchemyError

from deepenc.errors import StoreError

CLOCKS = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "EXTRACT(EPOCH FROM clock_timestamp())",
}
"""Seconds since 1970, by the clock of the database: all who use it agree on it, on whatever host they are."""

EXPECTED = "expected sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME with its driver installed"


def is_url(target: str) -> bool:
    """Whether a database is named by a URL; otherwise it is a file."""
    return "://" in target


def shown(target: str) -> str:
    """The target as messages name it: without a password."""
    return make_url(target).render_as_string() if is_url(target) else target


def clock(engine: Engine) -> ColumnElement[float]:
    """The time now, as SQL."""
    return literal_column(CLOCKS[engine.dialect.name], Float)


def open_engine(target: str, *, create: bool) -> Engine:
    """Get ready to use a database.

    Args:
        target: Path of an SQLite file, or a URL.
        create: Make a file where there is none, readable by its owner only: it holds the root of all keys.

    Raises:
        StoreError: There is none, it cannot be made, or the URL is of no known kind.
    """
    engine = _by_url(target) if is_url(target) else _by_path(Path(target), create)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _no_transaction_of_its_own)
        event.listen(engine, "begin", _begin_immediately)
    return engine


def _by_url(target: str) -> Engine:
    try:
        engine = create_engine(target)
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        raise StoreError(f"cannot use the database URL ({error}); {EXPECTED}") from error
    if engine.dialect.name not in CLOCKS:
        raise StoreError(f"cannot use a database of {engine.dialect.name}; {EXPECTED}")
    return engine


def _by_path(path: Path, create: bool) -> Engine:
    if not path.exists():
        if not create:
            raise StoreError(f"no run at {path}; start one with `deepenc run`, or give its folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StoreError(
                f"cannot make the folder {path.parent}, or {path.name} in it: {error.strerror}; choose a "
                "writable one"
            ) from error
    # Not a URL made of text: a path may have percent signs and question marks.
    return create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": 60})


def _no_transaction_of_its_own(connection: Any, _: Any) -> None:
    # The driver must not begin by itself, so that reading and writing are one transaction below.
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")


def _begin_immediately(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def explain(error: Exception) -> str:
    """What is wrong, and what to do about it."""
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
    general = "check that it can be reached" if isinstance(error, SQLAlchemyError) else "was it altered?"
    remedy = next((text for sign, text in remedies.items() if sign in cause), general)
    return f"{remedy} ({cause})"
