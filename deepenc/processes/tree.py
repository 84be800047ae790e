"""End a process and all that it has started, those that left its group among them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

MARK = "DEEPENC_WORKER"
"""Variable of the environment that says which worker a process comes from; children inherit it."""

PROC = Path("/proc")


def stop_tree(pid: int, mark: str) -> None:
    """Kill the process group that a worker leads, and whatever carries its mark; itself last.

    Args:
        pid: The worker's.
        mark: Value of `MARK` in its environment.
    """
    for _ in range(10):  # what is forked meanwhile is found the next time
        if not (strays := _strays(pid, mark)):
            break
        for stray in strays:
            _kill(stray)
    if hasattr(os, "killpg"):
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def _strays(pid: int, mark: str) -> list[int]:
    """Living processes with the mark in their environment that are not in the worker's group."""
    sign = f"{MARK}={mark}".encode()
    found = []
    for entry in PROC.iterdir() if PROC.is_dir() else ():
        if not entry.name.isdigit():
            continue
        try:
            if sign in (entry / "environ").read_bytes().split(b"\0"):
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) != pid and state != "Z":
                    found.append(int(entry.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
