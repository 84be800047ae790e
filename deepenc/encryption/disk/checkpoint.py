"""Encrypted networks on disk: a folder with the tensors (safetensors) and what is public of them (JSON)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepenc.encryption.cost.costs import memory
from deepenc.encryption.disk.header import HEADER, REMEDY, Header, check_fit, read_header
from deepenc.encryption.disk.sharded.shards import unreadable
from deepenc.encryption.disk.staging import Staging
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, verify
from deepenc.encryption.tensors import names_in, shared, tensors_of
from deepenc.errors import CheckpointError, ConfigError, SiteError
from deepenc.files import open_file, whole_file
from deepenc.network.factory import Factory
from deepenc.network.limits import Limits
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout, narrow, replace_widened

TENSORS = "model.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """An encrypted network as it was read from disk.

    Attributes:
        tensors: Its state dict; names that are tied share their tensor.
        sites: The victim's sites; `load_key` checks with them that this header is the one that was saved.
        allocation: Confusion channels of every site.
        fingerprint: Of the tensors; the key has the same.
        victim: Spec of the victim, where it was saved.
        factory: How the victim's structure is made, where it was saved.
        defense: Name and public parameters of the defense.
        memory: Measured ΔMem / Mem.
    """

    tensors: Mapping[str, Tensor]
    sites: tuple[Site, ...]
    allocation: Mapping[str, int]
    fingerprint: str
    victim: Mapping[str, Any] | None
    factory: Factory | None
    defense: Mapping[str, Any]
    memory: float

    @classmethod
    def of(cls, header: Header, tensors: Mapping[str, Tensor]) -> Self:
        """Tensors with what their header says of them; both were checked before."""
        own = {n: getattr(header, n) for n in cls.__dataclass_fields__ if n != "tensors"}
        return cls(tensors, **(own | {"sites": header.released_sites()}))

    def __repr__(self) -> str:
        return (
            f"Checkpoint({(self.victim or {}).get('name', 'unknown victim')} encrypted with "
            f"{self.defense.get('name', 'an unknown defense')}: {len(self.tensors)} tensors, "
            f"{sum(self.allocation.values())} confusion channels at {len(self.sites)} sites, "
            f"{self.fingerprint[:12]})"
        )

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
        limits = Limits.of(tensor.shape for tensor in self.tensors.values())
        if self.factory.name not in allow:  # sizes of a forged file take no memory before they are checked
            with suppress(ConfigError):
                self._check(self.factory.build("meta", limits=limits))
        return self.network(self.factory.build(allow=allow, limits=limits))

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
            return replace_widened(structure, copies, Layout.appended(self.sites, self.allocation))
        except SiteError as error:
            raise CheckpointError(f"the header does not fit the network: {error}; {REMEDY}") from error

    def _check(self, structure: nn.Module) -> None:
        """Raise where a structure has other tensors, or other sizes, than the victim had."""
        layout = Layout.appended(self.sites, self.allocation)
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
                    f"{setting.module}.{setting.name} is not what the header says; {REMEDY}"
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
        ConfigError: The factory is invalid.
        CheckpointError: The folder is in use or cannot be written, or a tensor cannot be stored.
        KeyFileError: The key is another network's.
    """
    folder = Path(folder)
    try:
        with Staging(folder) as place:
            write(place.folder, encrypted, key, victim=victim, factory=factory, defense=defense)
            place.release()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the network to {folder}: {error}; give a folder on a writable disk with room"
        ) from error


def write(
    folder: Path,
    encrypted: nn.Module,
    key: Key,
    *,
    victim: Mapping[str, Any] | None,
    factory: Factory | str | Mapping[str, Any] | None,
    defense: Mapping[str, Any],
) -> None:
    """Write the files of an encrypted network into a folder that is there; arguments as for `save`.

    Raises:
        OSError, SafetensorError: They cannot be written.
    """
    tensors = tensors_of(encrypted, key.sites)
    verify(tensors, key)
    cost = memory(_narrowed_shapes(tensors, key.layout()), key.sites, key.allocation)
    header = Header(
        victim=None if victim is None else dict(victim),
        factory=None if factory is None else Factory.of(factory),
        defense=dict(defense),
        sites=key.sites,
        allocation=key.allocation,
        fingerprint=key.fingerprint,
        memory=cost.ratio,
    )
    _write(folder / TENSORS, tensors)
    (folder / HEADER).write_text(header.signed(key).model_dump_json(indent=2) + "\n")


def load(folder: str | Path) -> Checkpoint:
    """Read an encrypted network that `save` wrote, and verify that nothing in it changed.

    Raises:
        CheckpointError: A file is missing, cut, altered, of another format or from a newer version.
    """
    folder = Path(folder)
    header = read_header(folder / HEADER)
    tensors = header.own(_read(folder / TENSORS), folder)
    found = fingerprint(tensors)
    if found != header.fingerprint:
        raise CheckpointError(
            f"the tensors in {folder / TENSORS} are not those that were saved (fingerprint {found[:12]}, "
            f"expected {header.fingerprint[:12]}); {REMEDY}"
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
    try:
        with whole_file(path) as temporary:
            _write(temporary, tensors)
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
    path.touch()
    mode = path.stat().st_mode
    save_file(kept, path, metadata={"format": "pt"} | aliases)
    path.chmod(mode)  # readable as other new files are, which the library's are not


def _read(path: Path) -> dict[str, Tensor]:
    try:
        open_file(path).close()
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            aliases = file.metadata() or {}
            if aliases.pop("format", None) != "pt" or not set(aliases.values()) <= set(tensors):
                raise CheckpointError(f"the metadata of {path} were altered; {REMEDY}")
            return tensors | {alias: tensors[name] for alias, name in aliases.items()}
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def _narrowed_shapes(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The victim's tensors as views of the encrypted ones: right in shape and dtype, not in values."""
    result = {}
    known = names_in(layout, tensors)
    for name, tensor in tensors.items():
        shape = layout.narrowed_shape(known[name], tensor.shape)
        result[name] = tensor[tuple(slice(size) for size in shape)]
    return result
