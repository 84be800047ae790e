"""Write an encrypted network and its key, and see that the one opens the other; replace nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepenc.errors import CheckpointError, ConfigError, KeyFileError, VictimError
from deepenc.files import only_one, open_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from torch import Tensor, nn

    from deepenc.encryption.disk.checkpoint import Checkpoint
    from deepenc.encryption.disk.staging import Staged
    from deepenc.encryption.keys.key import Key
    from deepenc.victims.victim import VictimSource

HEADER = "deepenc.json"  # as in disk/header.py, which takes seconds to import
IMAGES = 512
"""The owner's, at most, on which a release is tried without its key."""
HARDLY = 0.9
"""Share of the accuracy, left without the key, from which a release counts as hardly damaged."""


def refuse_folder(folder: Path, force: bool) -> None:
    """Complete an interrupted replacement of a release; raise ConfigError where it may not be replaced."""
    from deepenc.encryption.disk.staging import finish

    finish(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the encrypted network")
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and not force:
        raise ConfigError(f"{folder} exists already; give another path, or --force to replace it")
    if taken and not (folder / HEADER).is_file():
        raise ConfigError(f"{folder} holds something other than an encrypted network; give another path")


def refuse_published(path: Path, folder: Path, what: str) -> None:
    """Raise ConfigError where something secret would lie in the folder of a release."""
    real = Path(os.path.realpath(path))
    inside = real.is_relative_to(os.path.realpath(folder))
    if inside or any((parent / HEADER).is_file() for parent in real.parents):
        raise ConfigError(
            f"{path} lies in the folder of an encrypted network, and {what} would be given away with it; "
            "give a path elsewhere"
        )


def refuse_key(key: Path, folder: Path, force: bool) -> None:
    """Raise ConfigError where a key cannot be written: inside a release, or over anything but a key.

    Args:
        key: The file for it.
        folder: The release that it is of.
        force: Whether another key may be replaced.
    """
    refuse_published(key, folder, "the key")
    _refuse_file(key, b'{"format":"deepenc-key"', "a key", force)


def refuse_tensors(path: Path, folder: Path, secrets: list[Path | None], force: bool) -> None:
    """Raise ConfigError where a victim's tensors cannot be written.

    Args:
        path: The file for them.
        folder: The release that they are decrypted from.
        secrets: Files that open it, none of which may be written over.
        force: Whether other tensors may be replaced.
    """
    refuse_published(path, folder, "the victim")
    for secret in secrets:
        if secret is not None and os.path.realpath(path) == os.path.realpath(secret):
            raise ConfigError(f"{path} is what opens the network; give another file for the tensors")
    _refuse_file(path, None, "tensors", force)


def _refuse_file(path: Path, start: bytes | None, what: str, force: bool) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file for {what}")
    if not force:
        raise ConfigError(f"{path} exists already; give another path, or --force to replace it")
    try:
        with open_file(path) as file:
            found = file.read(64)
    except OSError as error:
        raise ConfigError(f"{path} cannot be replaced: {error.strerror}; give another path") from error
    # A safetensors file begins with the length of its header, in 8 bytes, and then the header, in JSON.
    ours = found.startswith(start) if start is not None else found[8:9] == b"{" and found[7:8] == b"\0"
    if found and not ours:
        raise ConfigError(f"{path} holds something other than {what}; give another path")


@contextmanager
def staged_key(
    key: Key,
    path: Path,
    openings: tuple[str | None, Sequence[X25519PublicKey]],
    folder: Path,
    force: bool,
) -> Iterator[Staged]:
    """Seal a key into a file beside the one that it will replace together with its release's folder.

    Raises:
        ConfigError: A key that may not be replaced was put there meanwhile.
        KeyFileError: It cannot be written.
    """
    from deepenc.encryption.disk.staging import Staged, discard, waiting
    from deepenc.encryption.keys.key import save_key

    passphrase, recipients = openings
    with ExitStack() as held:
        try:
            held.enter_context(only_one(path))
            refuse_key(path, folder, force)
            discard(path, folder)
            held.callback(discard, path, folder)
            save_key(key, waiting(path), passphrase, recipients=recipients)
            staged = Staged.of(path)
        except OSError as error:
            raise KeyFileError(
                f"cannot write the key to {path}: {error}; give a path in a writable folder"
            ) from error
        yield staged


def write_release(
    folder: Path,
    encrypted: nn.Module,
    key: Key,
    key_file: Path,
    *,
    victim: Mapping[str, Tensor],
    openings: tuple[str | None, list[X25519PublicKey]],
    source: Mapping[str, Any] | None,
    factory: Any,
    defense: Mapping[str, Any],
    force: bool,
) -> Checkpoint:
    """Write a release and its key: both or, whenever this ends, what was there before.

    Args:
        folder: For the network.
        encrypted: The network.
        key: Its key.
        key_file: For the key.
        victim: Tensors that what was written must decrypt to, bit for bit, by name.
        openings: Passphrase and recipients of the key.
        source: Spec of the victim.
        factory: How the victim's structure is made.
        defense: Spec of the defense.
        force: Replace a release and a key that are there.

    Returns:
        What was written, read again.

    Raises:
        CheckpointError: It cannot be written, or does not decrypt to the victim.
        KeyFileError: The key cannot be written.
    """
    import torch
    from safetensors import SafetensorError

    from deepenc.encryption.disk import checkpoint
    from deepenc.encryption.disk.sharded.shards import files_of
    from deepenc.encryption.disk.staging import Staging

    try:
        with Staging(folder, replace=force) as place:
            checkpoint.write(place.folder, encrypted, key, victim=source, factory=factory, defense=defense)
            stored = checkpoint.load(place.folder)
            restored = checkpoint.decrypt_tensors(stored.tensors, key)
            for name, tensor in victim.items():
                if restored[name].dtype != tensor.dtype or not torch.equal(restored[name], tensor):
                    raise CheckpointError(
                        f"{folder}: what was written does not decrypt to the victim; the disk may be failing"
                    )
            with staged_key(key, key_file, openings, folder, force) as staged:
                place.release(staged, drop={HEADER, *files_of(folder)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the network to {folder}: {error}; give a folder on a writable disk with room"
        ) from error
    return stored


def what_is_left(source: VictimSource, model: nn.Module, encrypted: nn.Module, example: Any) -> str:
    """What a released network is worth as it is, without its key, in words.

    Args:
        source: The victim.
        model: Its network.
        encrypted: The encrypted network.
        example: Its example input, for a victim without images.
    """
    from deepenc.arena.metrics import judge
    from deepenc.victims.data.cache import cache_folder

    try:
        victim = source.load(cache_folder())
    except VictimError:
        return f"Used without the key: outputs on the example {_moved(model, encrypted, example)}."
    some, task = victim.defender[:IMAGES], victim.task
    before, after = (100 * judge(one, some, task, who="the release").value for one in (model, encrypted))
    shares = f"{after:.1f} % instead of {before:.1f} %"
    text = f"Used without the key: {task.measure} {shares} ({len(some)} examples)."
    if after > HARDLY * before:
        text += " That is hardly any damage: take another defense, or more channels."
    return f"{text}\nWhat attacks get out of it: deepenc run; every built-in defense falls to some of them."


def _moved(model: nn.Module, encrypted: nn.Module, example: Any) -> str:
    import torch

    from deepenc.network.calling import call
    from deepenc.network.tracing.admit import tensors_in

    with torch.no_grad():
        pairs = zip(tensors_in(call(model, example)), tensors_in(call(encrypted, example)), strict=True)
        floats = [(a.double(), b.double()) for a, b in pairs if a.is_floating_point()]
    distance = sum(float((b - a).square().sum()) for a, b in floats)
    size = sum(float(a.square().sum()) for a, _ in floats)
    return f"move by {100 * (distance / size) ** 0.5:.0f} % of their size" if size else "are all zero"
