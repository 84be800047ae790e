"""The public header of an encrypted network.

Limits keep a forged one from exhausting the memory or time of whoever reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from deepenc.encryption.disk.staging import finish
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, ReleasedSites
from deepenc.errors import CheckpointError, SiteError
from deepenc.files import read_file
from deepenc.network.factory import Factory
from deepenc.network.sites import Setting, Site, Slot
from deepenc.network.surgery import Layout

HEADER = "deepenc.json"
FORMAT: Final = "deepenc-network"
VERSION: Final = 1

REMEDY = "restore the folder from its original"

MAX_HEADER = 2**24
"""Bytes of a header; a mixture of hundreds of experts needs half of it."""

MAX_VALUES = 2**19
"""Values in a header: parsed, each may take 200 bytes."""

MAX_CHANNELS = 2**22
"""Confusion channels of a whole network; in the largest language models, 5 % are a fifth of it."""

_PARTS: dict[str, TypeAdapter[Any]] = {"slots": TypeAdapter(Slot), "settings": TypeAdapter(Setting)}


class Header(BaseModel):
    """Contents of the JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["deepenc-network"] = FORMAT
    version: Literal[1] = VERSION
    victim: dict[str, Any] | None
    factory: Factory | None = None
    defense: dict[str, Any]
    sites: tuple[Site, ...]
    allocation: dict[str, int]
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    memory: float = Field(ge=0, allow_inf_nan=False)
    beside: dict[str, str] = {}
    """Fingerprints of what else is in the files: masks that the network makes by itself, and the like."""
    seal: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    digest: str = ""

    def signed(self, key: Key) -> Self:
        """The same, signed by the key of the network, and digested."""
        return self.model_copy(update={"seal": key.sign(self._contents())}).digested()

    def released_sites(self) -> ReleasedSites:
        """The sites, with what the key must have signed."""
        return ReleasedSites.of(self.sites, self.fingerprint, self._contents(), self.seal)

    def own(self, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        """The network's own tensors, of all that were read.

        Raises:
            CheckpointError: Others are missing or not those that were saved.
        """
        for name, mark in self.beside.items():
            if name not in tensors or fingerprint({name: tensors[name]}) != mark:
                raise CheckpointError(f"tensor {name!r} in {path} is not the one that was saved; {REMEDY}")
        return {name: tensor for name, tensor in tensors.items() if name not in self.beside}

    def _contents(self) -> str:
        return _digest(self.model_copy(update={"seal": ""}).model_dump(mode="json"))

    def digested(self) -> Self:
        """The same with a SHA-256 over all the rest, which tells accidents from contents."""
        return self.model_copy(update={"digest": _digest(self.model_dump(mode="json"))})


def read_header(path: Path) -> Header:
    """Read what is public of an encrypted network.

    Raises:
        CheckpointError: The file is missing, cut, altered, of another format or from a newer version.
    """
    try:
        finish(path.parent)
        data = read_file(path, MAX_HEADER)
        document = json.loads(data) if data.count(b",") <= MAX_VALUES else None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; give the folder of a saved encrypted network"
        ) from error
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is cut, altered, or no header of an encrypted network; {REMEDY}")
    version = document.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this deepenc reads up to {VERSION}; install a newer deepenc"
        )
    if fault := first_fault(document, set(Header.model_fields)):
        raise CheckpointError(f"{path}: {fault}; {REMEDY}")
    try:
        header = Header.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {brief(error)}; {REMEDY}") from error
    if header.digest != _digest(document):
        raise CheckpointError(f"{path} was altered: its contents do not give its digest; {REMEDY}")
    return header


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a header's contents but the digest itself."""
    rest = {field: value for field, value in document.items() if field != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_fit(header: Header, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise where the header, forged or of another network, speaks of what the tensors do not have."""
    counts = header.allocation
    if set(counts) != {site.name for site in header.sites} or len(counts) != len(header.sites):
        raise CheckpointError(f"{folder / HEADER} lists sites and allocation that disagree; {REMEDY}")
    if sum(counts.values()) > MAX_CHANNELS or not all(site.slots for site in header.sites):
        raise CheckpointError(f"{folder / HEADER} has channels that no tensor has room for; {REMEDY}")
    for site in header.sites:
        for slot in site.slots:
            found = tensors.get(slot.tensor)
            shape = found.shape if found is not None and found.numel() else ()
            end = slot.start + slot.block * (site.width + counts[site.name])
            numbers = (slot.start, slot.dim, counts[site.name], slot.block - 1, site.width - 1)
            if min(numbers) < 0 or slot.dim >= len(shape) or end > shape[slot.dim]:
                raise CheckpointError(
                    f"{folder / HEADER} puts site {site.name!r} where tensor {slot.tensor!r} of shape "
                    f"{tuple(shape)} has no room for it; {REMEDY}"
                )
    try:
        layout = Layout.appended(header.sites, counts)
        for name in layout.changed():
            layout.kept(name, layout.narrowed_shape(name, tensors[name].shape))
    except SiteError as error:
        raise CheckpointError(f"{folder / HEADER} does not fit the tensors: {error}; {REMEDY}") from error


def first_fault(document: dict[str, Any], fields: set[str]) -> str | None:
    """What is wrong with the parts of a header, if anything.

    pydantic collects every fault: of a header of 4 MiB full of them, 2 million in 3 GiB. This stops at the
    first, and leaves few that pydantic could still find.

    Args:
        document: The header, parsed.
        fields: Names that it may have.
    """
    if strangers := set(document) - fields:
        return f"unknown field {min(strangers)[:40]!r}"
    sites, allocation = document.get("sites", []), document.get("allocation", {})
    if not isinstance(allocation, dict) or not all(type(n) is int for n in allocation.values()):
        return "the allocation does not map names to counts"
    beside = document.get("beside", {})
    if not isinstance(beside, dict) or not all(type(mark) is str for mark in beside.values()):
        return "beside does not map names to fingerprints"
    if not isinstance(sites, list):
        return "the sites are no list"
    for site in sites:
        if not isinstance(site, dict) or type(site.get("name")) is not str:
            return "a site has no name"
        for field, adapter in _PARTS.items():
            if fault := _first(site.get(field, []), adapter):
                return f"a site's {field}: {fault}"
    return None


def _first(parts: Any, adapter: TypeAdapter[Any]) -> str | None:
    if not isinstance(parts, list):
        return "no list"
    for part in parts:
        try:
            adapter.validate_json(json.dumps(part), strict=True)
        except ValidationError as error:
            return brief(error)
    return None


def brief(error: ValidationError) -> str:
    """The first fault that pydantic found, in a line; without the value, which may be of any size."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(step)[:40] for step in fault["loc"][:6]) or "it"
    return f"{where}: {fault['msg'][:200]}"
