"""Records as CSV: one row a record, everything in it; what was not measured is an empty field."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deepenc.arena.record import Cost, Detection, Provenance, Record, Score
from deepenc.errors import StoreError

_PARTS: dict[str, type[BaseModel]] = {
    "score": Score,
    "detection": Detection,
    "cost": Cost,
    "provenance": Provenance,
}

COLUMNS = tuple(
    f"{field}_{part}" if part else field
    for field in Record.model_fields
    for part in (_PARTS[field].model_fields if field in _PARTS else ("",))
)
"""Column names, in the order of `Record`; a part's fields carry its name in front."""


def row(record: Record) -> dict[str, Any]:
    """A record as a flat mapping with the keys `COLUMNS`; absent values are None."""
    flat: dict[str, Any] = dict.fromkeys(COLUMNS)
    for field, value in record.model_dump().items():
        if field not in _PARTS:
            flat[field] = value
        elif value is not None:
            flat |= {f"{field}_{part}": inner for part, inner in value.items()}
    return flat


def write_csv(records: Iterable[Record], path: str | Path) -> int:
    """Write records to a CSV file (UTF-8, comma, header line).

    Returns:
        Number of records.

    Raises:
        StoreError: The file cannot be written.
    """
    rows = [row(record) for record in records]
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another file") from error
    return len(rows)
