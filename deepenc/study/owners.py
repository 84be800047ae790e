"""Who is running a trial: a process that can be told apart from any later one of the same number."""

from __future__ import annotations

import os
import socket
import subprocess
import uuid
from pathlib import Path

# Runs of this very process that are under way; a run that ended without giving back its cells is not.
_here: set[str] = set()


def new_owner() -> str:
    """A name for a run that starts in this process: host, process, its start, and a mark of the run."""
    owner = "|".join([socket.gethostname(), str(os.getpid()), _started(os.getpid()), uuid.uuid4().hex])
    _here.add(owner)
    return owner


def retire(owner: str) -> None:
    """Say that the run is over."""
    _here.discard(owner)


def alive(owner: str) -> bool:
    """Whether a run is still under way; of one on another host that is not known, and taken to be so."""
    host, pid, started, _ = owner.split("|")
    if host != socket.gethostname():
        return True
    if int(pid) == os.getpid():
        return owner in _here
    return bool(started) and _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, in whatever form the system says it; empty where there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]
    told = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return told.stdout.strip()
