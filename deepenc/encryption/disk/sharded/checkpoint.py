"""Checkpoints larger than memory, encrypted and decrypted one tensor at a time."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Allocation, Defense, Original, Placement
from deepenc.encryption.disk.checkpoint import Checkpoint
from deepenc.encryption.disk.header import HEADER, Header, check_fit, read_header
from deepenc.encryption.disk.sharded.partial import Partial
from deepenc.encryption.disk.sharded.pretrained import check_complete, examples_of, structure_of
from deepenc.encryption.disk.sharded.rewrite import (
    Progress,
    copy_beside,
    fingerprint_of,
    rewrite,
    write_index,
)
from deepenc.encryption.disk.sharded.shards import Reader, Shards, files_of, open_shards
from deepenc.encryption.disk.sharded.streaming import Inserter, Remover
from deepenc.encryption.disk.staging import Staged, finish, refuse_used
from deepenc.encryption.encrypt import DefenseLike, checked
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, check_sites
from deepenc.encryption.keys.secret import derive_binding, derive_positions, derive_rng, secret_of
from deepenc.encryption.tensors import shared, tensors_of
from deepenc.errors import CheckpointError, ConfigError, KeyFileError, PluginError, SiteError, TraceError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout

_LOG = logging.getLogger(__name__)


def encrypt_checkpoint(
    source: str | Path,
    target: str | Path,
    defense: DefenseLike = "paper-samp",
    *,
    seed: int | None = None,
    secret: bytes | None = None,
    sites: Sequence[Site] | None = None,
    keep: Callable[[Key], Staged | None] | None = None,
    replace_target: bool = False,
    progress: Progress | None = None,
) -> Key:
    """Encrypt a Hugging Face style checkpoint into a folder of the same files.

    One tensor at a time is in memory. The target has its name only when it is whole; interrupted, the work
    goes on where it was if it is started again with the same secret or seed, and starts over with another.

    Args:
        source: Folder with ``config.json`` and ``model.safetensors``, or several files and their index.
        target: Where to; must not exist yet, or be empty. ``config.json`` and the tokenizer's files come
            along; other files of the source do not, since weights may be in them.
        defense: As for `encrypt`; its placement may look at shapes only, its weights must be of those that
            fill one tensor at a time (`Weights.per_tensor`), and it must have no hardening.
        seed: As for `encrypt`.
        secret: As for `encrypt`.
        sites: The victim's sites, where they are known; default: `find_sites`, on the meta device, and of
            those what is all in the files.
        keep: Called with the key before the target appears, to save it. A file that it returns
            (`staging.Staged`) takes its place together with the target.
        replace_target: Replace the files of a network that is encrypted already, once the new ones are whole.
        progress: Told of the progress.

    Returns:
        The key.

    Raises:
        CheckpointError: The source is cut, altered, quantised or encrypted already, or the target is in use
            or cannot be written.
        ConfigError: The defense inserts nothing or cannot be applied to one tensor at a time, or
            transformers is not installed or does not know the network.
        PluginError: A plugin of the defense broke its interface.
        SiteError: The network has no sites, or the given ones do not fit it.
    """
    source, target = Path(source), Path(target)
    chosen = Defense.of(defense)
    placement, weights = chosen.placement, chosen.weights
    if placement is None or weights is None:
        raise ConfigError(f"the defense {chosen.name!r} inserts nothing; a copy of the checkpoint will do")
    _refuse_whole_networks(chosen)
    root = secret_of(seed, secret)
    finish(target)
    refuse_used(target, replace_target)
    if (source / HEADER).exists():
        raise CheckpointError(f"{source} is encrypted already: it has {HEADER}; give the victim's checkpoint")
    shards = open_shards(source)
    network, factory = structure_of(source, shards.entries())
    ties = _ties(network, shards)
    metas = _metas(shards, ties)
    strangers = check_complete(network, metas, source)
    example = examples_of(network)[0]
    usable = tuple(sites) if sites is not None else _usable(_find(network), network, metas)
    check_sites(usable)
    allocation = _allocate(placement, Original(network, usable, example), root)
    layout = Layout(usable, derive_positions(root, usable, allocation))
    known = _known(layout, shards, ties)
    strangers -= known.keys()
    header = Header(
        victim={"name": f"{factory.library}:{factory.name}"},
        factory=factory,
        defense=chosen.spec(),
        sites=usable,
        allocation={site.name: len(layout.positions[site.name]) for site in usable},
        fingerprint="0" * 64,
        memory=memory(metas, usable, allocation).ratio,
    )
    check_fit(header.model_copy(update={"allocation": dict.fromkeys(header.allocation, 0)}), metas, source)
    about = [*_state(shards), header.model_dump(mode="json"), str(source.resolve())]
    run = hmac.new(root, json.dumps(about, sort_keys=True).encode(), hashlib.sha256).hexdigest()
    with _disk(target), Partial(target, run, replace=replace_target) as place:
        change = Inserter(layout, weights, root)
        written = rewrite(shards, change, known, ties, place, progress)
        beside = {name: fingerprint_of({name: written.pop(name)}, {}) for name in sorted(strangers)}
        mark = fingerprint_of(written, ties)
        write_index(shards, place, change, known)
        positions = {name: p for name, p in layout.positions.items() if p}
        key = Key(usable, positions, mark, binding=derive_binding(root))
        header = header.model_copy(update={"fingerprint": mark, "beside": beside}).signed(key)
        (place.folder / HEADER).write_text(header.model_dump_json(indent=2) + "\n")
        copy_beside(source, place.folder)
        place.complete = True
        place.release(None if keep is None else keep(key), drop={HEADER, *files_of(target)})
    return key


def decrypt_checkpoint(
    folder: str | Path, key: Key, target: str | Path, *, progress: Progress | None = None
) -> None:
    """Decrypt a folder that `encrypt_checkpoint` wrote: the victim's files, every tensor bit for bit.

    Args:
        folder: The encrypted checkpoint.
        key: Its key.
        target: Where to; must not exist yet, or be empty. It appears only when every tensor has proved to
            be as it was encrypted; interrupted, the work goes on where it was.
        progress: Told of the progress.

    Raises:
        KeyFileError: The key is another network's.
        CheckpointError: A file is missing, cut or altered, or the target is in use or cannot be written.
    """
    folder, target = Path(folder), Path(target)
    finish(target)
    refuse_used(target)
    header = read_header(folder / HEADER)
    if key.fingerprint != header.fingerprint or key.sites != header.sites:
        raise KeyFileError(
            f"the key is for the encrypted network {key.fingerprint[:12]}, {folder} is "
            f"{header.fingerprint[:12]}; use the key that was made with it"
        )
    header.released_sites().check(key)
    shards = open_shards(folder)
    ties = shards.aliases()
    check_fit(header, _metas(shards, ties), folder)
    layout = key.layout()
    known = _known(layout, shards, ties)
    change = Remover(layout)
    state = [*_state(shards), key.fingerprint, sorted(key.positions.items()), str(folder.resolve())]
    run = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    with _disk(target), Partial(target, run) as place:
        read = rewrite(shards, change, known, {}, place, progress)
        beside = {name: fingerprint_of({name: read.pop(name)}, {}) for name in header.beside if name in read}
        found = fingerprint_of(read, ties)
        if found != key.fingerprint or beside != header.beside:
            raise CheckpointError(
                f"the tensors in {folder} are not those that were encrypted (fingerprint {found[:12]}, the "
                f"key's is {key.fingerprint[:12]}); restore the folder from its original"
            )
        write_index(shards, place, change, known)
        copy_beside(folder, place.folder)
        place.complete = True
        place.release()


def sites_of(folder: str | Path) -> tuple[Site, ...]:
    """The victim's sites, as an encrypted folder has them; its key opens with them.

    Raises:
        CheckpointError: The header is missing, altered, of another format or from a newer version.
    """
    return read_header(Path(folder) / HEADER).released_sites()


def load_sharded(folder: str | Path) -> Checkpoint:
    """Read an encrypted checkpoint of any number of files into memory, and verify that nothing changed.

    Raises:
        CheckpointError: A file is missing, cut, altered, of another format or from a newer version.
    """
    folder = Path(folder)
    header = read_header(folder / HEADER)
    shards = open_shards(folder)
    ties = shards.aliases()
    check_fit(header, _metas(shards, ties), folder)
    tensors: dict[str, Tensor] = {}
    with _disk(folder):
        for shard in shards.files:
            with Reader(shard.path) as reader:
                tensors |= {entry.name: reader.read(entry) for entry in shard.entries}
    tensors = header.own(tensors | {alias: tensors[name] for alias, name in ties.items()}, folder)
    if fingerprint(tensors) != header.fingerprint:
        raise CheckpointError(
            f"the tensors in {folder} are not those that were saved; restore the folder from its original"
        )
    return Checkpoint.of(header, tensors)


def _refuse_whole_networks(defense: Defense) -> None:
    if defense.hardening:
        raise ConfigError(
            f"the defense {defense.name!r} hardens ({', '.join(step.name for step in defense.hardening)}), "
            "which needs the whole network in memory; leave the hardening out, or encrypt it as a victim"
        )
    assert defense.weights is not None
    if not defense.weights.per_tensor:
        raise ConfigError(
            f"the weights {defense.weights.name!r} of the defense {defense.name!r} need all of a site's "
            "tensors at once; choose others, such as 'samp', or encrypt it as a victim"
        )


def _ties(network: Any, shards: Shards) -> dict[str, str]:
    """Names of tied tensors that the files leave out -> the name under which they have them."""
    own = shards.entries()
    ties = shards.aliases()
    for names in shared(tensors_of(network)):
        if stored := [name for name in names if name in own]:
            ties |= {name: stored[0] for name in names if name not in own}
    return ties


def _metas(shards: Shards, ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors without values, under all their names; tied ones are one tensor."""
    metas = {name: entry.meta() for name, entry in shards.entries().items()}
    return metas | {alias: metas[name] for alias, name in ties.items()}


def _find(network: Any) -> list[Site]:
    *others, last = examples_of(network)
    for example in others:
        with suppress(TraceError):
            return find_sites(network, example)
    return find_sites(network, last)


def _usable(sites: Sequence[Site], network: Any, metas: Mapping[str, Tensor]) -> tuple[Site, ...]:
    """The sites whose tensors are all in the files."""
    result = []
    for site in sites:
        names = {slot.tensor for slot in site.slots}
        if missing := sorted(names - set(metas)):
            _LOG.info("site %s is left out: %s is not in the checkpoint's files", site.name, missing[0])
            continue
        result.append(site)
    if not result:
        raise SiteError(
            f"none of the {len(sites)} sites has all its tensors in the checkpoint's files, by the names "
            f"that {type(network).__name__} has for them, such as {sites[0].slots[0].tensor!r}; save it "
            "again, or encrypt it as a victim"
        )
    return tuple(result)


def _allocate(placement: Placement, original: Original, root: bytes) -> Allocation:
    try:
        allocation = placement.place(original, derive_rng(root, "placement"))
    except (NotImplementedError, RuntimeError) as error:  # what torch raises where there are no values
        raise PluginError(
            f"placement {placement.name!r} needs more than the network's shapes ({error}); choose one that "
            "does not, such as 'proportional', or encrypt it as a victim"
        ) from error
    return checked(placement, allocation, original.sites)


def _known(layout: Layout, shards: Shards, ties: Mapping[str, str]) -> dict[str, str]:
    """Names in the files of the tensors that are widened -> the name that the sites have for them.

    Raises:
        SiteError: A site's tensor is not in the files, or is there under two names that sites use.
    """
    own = shards.entries()
    known: dict[str, str] = {}
    for name in layout.changed():
        stored = name if name in own else ties.get(name)
        if stored is None or stored in known:
            raise SiteError(
                f"the checkpoint lacks the sites' tensor {name!r}; are the sites another network's?"
                if stored is None
                else f"the sites widen the tied tensors {name!r} and {known[stored]!r} both; leave one out"
            )
        known[stored] = name
    return known


def _state(shards: Shards) -> list[Any]:
    """What tells whether the files are still those of an interrupted run."""
    stats = [(shard.path.name, shard.path.stat()) for shard in shards.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


@contextmanager
def _disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read or write for {target}: {error}; what is finished is kept: start again when the "
            "disk is writable and has room"
        ) from error
