"""Encrypted networks on disk: a folder with the tensors (safetensors) and what is public of them (JSON)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepenc.encryption.fingerprint import fingerprint
from deepenc.encryption.forgery import MAX_CHANNELS, MAX_HEADER, MAX_VALUES, brief, first_fault
from deepenc.encryption.key import Key, verify
from deepenc.encryption.objective import memory
from deepenc.encryption.tensors import names_in, shared, tensors_of
from deepenc.errors import CheckpointError, ConfigError, SiteError
from deepenc.network.factory import Factory
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout, fit, narrow

TENSORS = "model.safetensors"
HEADER = "deepenc.json"
FORMAT: Final = "deepenc-network"
VERSION: Final = 1

_REMEDY = "restore the folder from its original"


class Header(BaseModel):
    """Contents of the JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["deepenc-network"] = FORMAT
    version: Literal[1] = VERSION
    victim: dict[str, Any] | None
    factory: Factory | None = None
    defense: dict[str, Any]
    sites: tuple[Site, ...]
    configuration: dict[str, int]
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    memory: float = Field(ge=0, allow_inf_nan=False)
    digest: str = ""

    def digested(self) -> Self:
        """The same with a SHA-256 over all the rest, which tells accidents from contents."""
        return self.model_copy(update={"digest": _digest(self.model_dump(mode="json"))})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An encrypted network as it was read from disk.

    Attributes:
        tensors: Its state dict; names that are tied share their tensor.
        sites: The victim's sites.
        configuration: Confusion channels of every site.
        fingerprint: Of the tensors; the key has the same.
        victim: Spec of the victim, where it was saved.
        factory: How the victim's structure is made, where it was saved.
        defense: Name and public parameters of the defense.
        memory: Measured ΔMem / Mem.
    """

    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    configuration: Mapping[str, int]
    fingerprint: str
    victim: Mapping[str, Any] | None
    factory: Factory | None
    defense: Mapping[str, Any]
    memory: float

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, Tensor]) -> Self:
        """Tensors with what their header says of them; both were checked before."""
        return cls(tensors, **{n: getattr(header, n) for n in cls.__dataclass_fields__ if n != "tensors"})

    def rebuild(self, allow: Collection[str] = ()) -> nn.Module:
        """The encrypted network, in eval mode on the CPU, its structure made by the saved factory.

        Args:
            allow: As for `Factory.build`: a function of somebody's own (``"package.module:function"``) is
                imported and called only if it is listed here.

        Raises:
            CheckpointError: No factory was saved, or it makes another network, or calls a function that
                ``allow`` does not list.
            ConfigError: The factory's library is not installed, or does not make the network any more.
        """
        if self.factory is None:
            raise CheckpointError(
                "the folder does not say how the network's structure is made; make it yourself, and give it "
                "to `network`, or save with `factory`"
            )
        if self.factory.library != "python":  # sizes of a forged file take no memory before they are checked
            with suppress(ConfigError):
                self._check(self.factory.build("meta"))
        return self.network(self.factory.build(allow=allow))

    def network(self, structure: nn.Module) -> nn.Module:
        """The encrypted network.

        Args:
            structure: A network of the victim's architecture; its weights do not matter, and it is left
                as it is.

        Returns:
            A new network with its own copy of the tensors.

        Raises:
            CheckpointError: The structure has other tensors, or other sizes, than the victim had.
        """
        self._check(structure)
        copies: dict[str, Tensor] = {}
        for names in shared(self.tensors):
            copies |= dict.fromkeys(names, self.tensors[names[0]].clone())
        try:
            return fit(structure, copies, _layout(self.sites, self.configuration))
        except SiteError as error:
            raise CheckpointError(f"the header does not fit the network: {error}; {_REMEDY}") from error

    def _check(self, structure: nn.Module) -> None:
        """Raise where a structure has other tensors, or other sizes, than the victim had."""
        layout = _layout(self.sites, self.configuration)
        known = names_in(layout, self.tensors)
        own = tensors_of(structure, self.sites)
        if different := sorted(set(own) ^ set(self.tensors)):
            raise CheckpointError(
                f"{type(structure).__name__} is not of the saved network's architecture: "
                f"{len(different)} tensors are in one of the two only, such as {different[:3]}"
            )
        for name, tensor in self.tensors.items():
            expected = layout.narrowed_shape(known[name], tensor.shape)
            if own[name].shape != expected:
                raise CheckpointError(
                    f"{type(structure).__name__} is not of the saved network's architecture: tensor {name!r} "
                    f"is {tuple(own[name].shape)}, the victim's was {expected}"
                )
            if own[name].dtype != tensor.dtype and not (
                own[name].is_floating_point() and tensor.is_floating_point()
            ):
                raise CheckpointError(
                    f"{type(structure).__name__} is not of the saved network's architecture: tensor {name!r} "
                    f"is {own[name].dtype}, the victim's was {tensor.dtype}"
                )
        modules = dict(structure.named_modules(remove_duplicate=False))
        for setting in (setting for site in self.sites for setting in site.settings):
            kept = vars(modules[setting.module]) if setting.module in modules else {}
            value = kept.get(setting.name) if setting.name != "training" else None
            if type(value) is not type(setting.victim) or value != setting.victim:
                raise CheckpointError(
                    f"{type(structure).__name__} is not of the saved network's architecture: its "
                    f"{setting.module}.{setting.name} is not what the header says; {_REMEDY}"
                )


def save(
    folder: str | Path,
    encrypted: nn.Module,
    key: Key,
    *,
    victim: Mapping[str, Any] | None = None,
    factory: Factory | str | Mapping[str, Any] | None = None,
    defense: Mapping[str, Any],
) -> None:
    """Write an encrypted network to a new folder; all of it or nothing. The key's positions stay out of it.

    Args:
        folder: Where to; must not exist yet, or be empty.
        encrypted: From `deepenc.encrypt`.
        key: Its key.
        victim: Spec of the victim.
        factory: How the victim's structure is made, for `Checkpoint.rebuild`.
        defense: `Defense.spec` of the defense.

    Raises:
        ConfigError: The factory cannot be meant.
        CheckpointError: The folder is in use or cannot be written, or a tensor cannot be stored.
        KeyFileError: The key is another network's.
    """
    folder = Path(folder)
    tensors = tensors_of(encrypted, key.sites)
    verify(tensors, key)
    layout = key.layout()
    cost = memory(_narrowed_shapes(tensors, layout), key.sites, key.configuration)
    header = Header(
        victim=None if victim is None else dict(victim),
        factory=None if factory is None else Factory.of(factory),
        defense=dict(defense),
        sites=key.sites,
        configuration=key.configuration,
        fingerprint=key.fingerprint,
        memory=cost.ratio,
    ).digested()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; remove it, or give a folder that does not")
    temporary = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}")
    try:
        try:
            temporary.mkdir(parents=True)
            _write(temporary / TENSORS, tensors)
            (temporary / HEADER).write_text(header.model_dump_json(indent=2) + "\n")
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the network to {folder}: {error}; give a folder on a writable disk with room"
        ) from error


def load(folder: str | Path) -> Checkpoint:
    """Read an encrypted network that `save` wrote, and verify that nothing in it changed.

    Raises:
        CheckpointError: A file is missing, cut, altered, of another format or from a newer version.
    """
    folder = Path(folder)
    header = read_header(folder / HEADER)
    tensors = _read(folder / TENSORS)
    found = fingerprint(tensors)
    if found != header.fingerprint:
        raise CheckpointError(
            f"the tensors in {folder / TENSORS} are not those that were saved (fingerprint {found[:12]}, "
            f"expected {header.fingerprint[:12]}); {_REMEDY}"
        )
    check_fit(header, tensors, folder)
    return Checkpoint.of(header, tensors)


def decrypt_tensors(tensors: Mapping[str, Tensor], key: Key) -> dict[str, Tensor]:
    """Take the confusion channels out of a state dict, without any network.

    Args:
        tensors: The encrypted network's tensors, as `Checkpoint.tensors` has them.
        key: Its key.

    Returns:
        The victim's state dict, bit for bit; what has no confusion channels is shared with ``tensors``.

    Raises:
        KeyFileError: The key is another network's, or a tensor was changed since it was made.
    """
    verify(tensors, key)
    layout = key.layout()
    known = names_in(layout, tensors)
    unkept = {slot.tensor for site in key.sites for slot in site.slots if not slot.persistent}
    result: dict[str, Tensor] = {}
    for name, first in known.items():
        if name == first:
            kept = layout.kept(name, layout.narrowed_shape(name, tensors[name].shape))
            result[name] = narrow(tensors[name], kept)
    result |= key.restored(result)
    return {name: result[first] for name, first in known.items() if name not in unkept}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict, such as a decrypted one, as a safetensors file; all of it or nothing.

    Of tied tensors one is stored; the metadata name the others, as `safetensors.torch.load_model` expects.

    Raises:
        CheckpointError: The file cannot be written, or a tensor cannot be stored.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        try:
            _write(temporary, tensors)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; give a path in a writable folder on a disk with room for it"
        ) from error


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    groups = shared(tensors)
    aliases = {name: first for first, *others in groups for name in others}
    kept = {}
    for first, *_ in groups:
        tensor = tensors[first].detach().cpu().contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        kept[first] = tensor if whole else tensor.clone()  # safetensors refuses views of a larger storage
    save_file(kept, path, metadata={"format": "pt"} | aliases)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases = file.metadata() or {}
            if aliases.pop("format", None) != "pt" or not set(aliases.values()) <= set(tensors):
                raise CheckpointError(f"the metadata of {path} were altered; {_REMEDY}")
            return tensors | {alias: tensors[name] for alias, name in aliases.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the tensors in {path}: {error}; {_REMEDY}") from error


def read_header(path: Path) -> Header:
    """Read what is public of an encrypted network.

    Raises:
        CheckpointError: The file is missing, cut, altered, of another format or from a newer version.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_HEADER + 1)
        sane = len(data) <= MAX_HEADER and data.count(b",") <= MAX_VALUES
        document = json.loads(data) if sane else None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; give the folder of a saved encrypted network"
        ) from error
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is cut, altered, or no header of an encrypted network; {_REMEDY}")
    version = document.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this deepenc reads up to {VERSION}; install a newer deepenc"
        )
    if fault := first_fault(document, set(Header.model_fields)):
        raise CheckpointError(f"{path}: {fault}; {_REMEDY}")
    try:
        header = Header.model_validate_json(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {brief(error)}; {_REMEDY}") from error
    if header.digest != _digest(document):
        raise CheckpointError(f"{path} was altered: its contents do not give its digest; {_REMEDY}")
    return header


def _digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a header's contents but the digest itself."""
    rest = {field: value for field, value in document.items() if field != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_fit(header: Header, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise where the header, forged or of another network, speaks of what the tensors do not have."""
    counts = header.configuration
    if set(counts) != {site.name for site in header.sites} or len(counts) != len(header.sites):
        raise CheckpointError(f"{folder / HEADER} lists sites and configuration that disagree; {_REMEDY}")
    if sum(counts.values()) > MAX_CHANNELS or not all(site.slots for site in header.sites):
        raise CheckpointError(f"{folder / HEADER} has channels that no tensor has room for; {_REMEDY}")
    for site in header.sites:
        for slot in site.slots:
            found = tensors.get(slot.tensor)
            shape = found.shape if found is not None and found.numel() else ()
            end = slot.start + slot.block * (site.width + counts[site.name])
            numbers = (slot.start, slot.dim, counts[site.name], slot.block - 1, site.width - 1)
            if min(numbers) < 0 or slot.dim >= len(shape) or end > shape[slot.dim]:
                raise CheckpointError(
                    f"{folder / HEADER} puts site {site.name!r} where tensor {slot.tensor!r} of shape "
                    f"{tuple(shape)} has no room for it; {_REMEDY}"
                )
    try:
        layout = _layout(header.sites, counts)
        for name in layout.changed():
            layout.kept(name, layout.narrowed_shape(name, tensors[name].shape))
    except SiteError as error:
        raise CheckpointError(f"{folder / HEADER} does not fit the tensors: {error}; {_REMEDY}") from error


def _layout(sites: tuple[Site, ...], configuration: Mapping[str, int]) -> Layout:
    """A layout of the right sizes; where the confusion channels really are, the key alone knows."""
    return Layout(sites, {s.name: tuple(range(s.width, s.width + configuration[s.name])) for s in sites})


def _narrowed_shapes(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The victim's tensors as views of the encrypted ones: right in shape and dtype, not in values."""
    result = {}
    known = names_in(layout, tensors)
    for name, tensor in tensors.items():
        shape = layout.narrowed_shape(known[name], tensor.shape)
        result[name] = tensor[tuple(slice(size) for size in shape)]
    return result
