"""Built-in batteries of attacks, as data: a file a version. Published versions never change."""

from __future__ import annotations

from pathlib import Path

from deepenc.arena.battery import Battery
from deepenc.plainyaml import read_file

_FOLDER = Path(__file__).parent


def _read(name: str) -> Battery:
    content, _ = read_file(_FOLDER / f"{name}.yaml")
    return Battery.model_validate({"name": name} | content)


def __getattr__(name: str) -> Battery:
    """``quick_1`` is the battery of quick-1.yaml; read when it is asked for."""
    path = name.replace("_", "-")
    if name.startswith("_") or not (_FOLDER / f"{path}.yaml").is_file():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _read(path)
