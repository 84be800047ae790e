"""The arena for confusion neurons: encrypt trained networks, attack them, measure what the thief got.

    sites = deepenc.find_sites(model, example)
    encrypted, key = deepenc.encrypt(model, example, "paper-samp")
    original = deepenc.decrypt(encrypted, key)

Names are imported when they are first used, so that ``import deepenc`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepenc.analysis.folding import fold
    from deepenc.encryption.cost.costs import memory
    from deepenc.encryption.defense import Defense, Hardening, Placement, Weights
    from deepenc.encryption.disk.checkpoint import Checkpoint, load, save
    from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
    from deepenc.encryption.keys.key import Key, load_key, save_key
    from deepenc.encryption.response.objective import gain, response_change
    from deepenc.errors import DeepencError
    from deepenc.network.find import find_sites
    from deepenc.network.sites import Role, Site, Slot
    from deepenc.report.evaluate import Report, evaluate

_HOMES = {
    "deepenc.encryption.disk.checkpoint": ("Checkpoint", "load", "save"),
    "deepenc.encryption.defense": ("Defense", "Hardening", "Placement", "Weights"),
    "deepenc.encryption.encrypt": ("decrypt", "encrypt", "reshelter"),
    "deepenc.encryption.keys.key": ("Key", "load_key", "save_key"),
    "deepenc.encryption.cost.costs": ("memory",),
    "deepenc.encryption.response.objective": ("gain", "response_change"),
    "deepenc.errors": ("DeepencError",),
    "deepenc.network.find": ("find_sites",),
    "deepenc.analysis.folding": ("fold",),
    "deepenc.network.sites": ("Role", "Site", "Slot"),
    "deepenc.report.evaluate": ("Report", "evaluate"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "DeepencError",
    "Defense",
    "Hardening",
    "Key",
    "Placement",
    "Report",
    "Role",
    "Site",
    "Slot",
    "Weights",
    "__version__",
    "decrypt",
    "encrypt",
    "evaluate",
    "find_sites",
    "fold",
    "gain",
    "load",
    "load_key",
    "memory",
    "reshelter",
    "response_change",
    "save",
    "save_key",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deepenc' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
