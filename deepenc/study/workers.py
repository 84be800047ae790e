"""Processes that fight trials; they never touch the study, so that nothing they do can spoil it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deepenc.processes import settle
from deepenc.seeds import Roots
from deepenc.study.search import Search
from deepenc.study.trials import Evaluator


@dataclass(frozen=True)
class Brief:
    """All that a worker must know, once.

    Attributes:
        search: As text (pydantic's plugins of the user's files must be loaded before they can be named).
        cache: Folder of the victims.
        root: Root of the tuning keys and seeds.
        plugin_files: To be loaded first.
        threads: For torch.
    """

    search: dict[str, Any]
    cache: Path
    root: Roots
    plugin_files: tuple[Path, ...]
    threads: int


@dataclass(frozen=True)
class Step:
    """How a trial goes; the worker waits to be told whether to give up."""

    step: int
    value: float


def serve(connection: Connection, brief: Brief) -> None:
    """Body of a worker process: takes the references, then the values of trials until the connection ends.

    Args:
        connection: To the coordinator.
        brief: What it must know.
    """
    settle(brief.threads, brief.plugin_files)
    evaluator = Evaluator(Search.model_validate(brief.search), brief.cache, brief.root)

    def report(step: int, value: float) -> bool:
        connection.send(Step(step, value))
        return bool(connection.recv())

    try:
        evaluator.references = connection.recv()
        while True:
            values: Mapping[str, Any] = connection.recv()
            connection.send(evaluator.run(values, report))
    except (EOFError, OSError):
        return
