"""What made a result: the code, for a cell's identity; versions and machine, for its record."""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from deepenc.arena.record import Provenance

PACKAGE = Path(__file__).parents[1]
UNRELATED = ("cli/", "report/", "study/", "arena/run/", "arena/estimates/", "config.py")
"""Parts of the package that order, repeat and show duels, and change no result."""


@cache
def core_version() -> str:
    """Hash of deepenc's own sources, as far as a duel depends on them; read once per process."""
    return hash_of(PACKAGE)


def hash_of(package: Path) -> str:
    """Hash of the sources that a duel depends on, by name and content.

    Args:
        package: The folder of deepenc.
    """
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if not name.startswith(UNRELATED):
            total.update(f"{name} {_read(*_state(path))[0]}\n".encode())
    return total.hexdigest()[:16]


def code_version(plugin: object) -> str:
    """Hash of a plugin's source file, and of those that it imports from its own folder or package."""
    try:
        source = inspect.getsourcefile(type(plugin))
    except TypeError:
        source = None
    if source is None or not Path(source).is_file():
        return ""  # defined in a notebook, or on standard input
    file = Path(source).resolve()
    folder = file.parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    files = [file] if file.is_relative_to(PACKAGE) else sorted(_closure(file, folder))
    named = [f"{path.relative_to(folder).as_posix()} {_read(*_state(path))[0]}" for path in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]


def _closure(file: Path, folder: Path) -> set[Path]:
    """A file and those that it imports, directly or not, as far as they lie in a folder.

    Args:
        file: A Python file.
        folder: Where absolute imports begin. In a package, the folder that holds the package: of what else
            lies there, nothing counts.
    """
    inside = folder if file.parent == folder else folder / file.relative_to(folder).parts[0]
    found, waiting = {file}, [file]
    while waiting:
        here = waiting.pop()
        for level, name in _read(*_state(here))[1]:
            start = here.parents[level - 1] if level else folder
            path = start.joinpath(*name.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate not in found and candidate.is_relative_to(inside) and candidate.is_file():
                    found.add(candidate)
                    waiting.append(candidate)
    return found


def _state(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4096)
def _read(path: Path, changed: int, size: int) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Hash of a file, and its imports; the other arguments tell when a file is another."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), tuple(dict.fromkeys(_imports(content)))


def _imports(content: bytes) -> Iterator[tuple[int, str]]:
    """Level (0: absolute) and name of all modules that a file may import."""
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from ((0, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            parts = module.split(".")
            yield from ((node.level, ".".join(parts[:end])) for end in range(1, len(parts) + 1))
            yield from ((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names)


class Clock:
    """Notes when something began.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, device: str) -> None:
        self._device, self._began, self._now = device, datetime.now(UTC), time.perf_counter()

    def provenance(self) -> Provenance:
        """Versions, machine and time of what has run since."""
        package, commit = _package()
        return Provenance(
            deepenc=package,
            commit=commit,
            torch=str(torch.__version__),
            python=platform.python_version(),
            platform=platform.platform(),
            processor=_processor(),
            device=torch.cuda.get_device_name() if self._device == "cuda" else self._device,
            threads=torch.get_num_threads(),
            started=self._began.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - self._now,
        )


@cache
def _package() -> tuple[str, str | None]:
    """Deepenc's version, and the commit where it runs from a working copy."""
    try:
        number = version("deepenc")
    except PackageNotFoundError:
        number = "unknown"
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return number, None
    told = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(told, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return number, None
    return number, answer.stdout.strip() or None


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
