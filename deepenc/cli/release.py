"""Write an encrypted network and its key, and see that the one opens the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepenc.cli.files import replacing, same
from deepenc.errors import CheckpointError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from torch import Tensor, nn

    from deepenc.encryption.disk.checkpoint import Checkpoint
    from deepenc.encryption.keys.key import Key


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
) -> Checkpoint:
    """Write a release and its key; where that fails, what was there before is there again.

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

    Returns:
        What was written, read again.

    Raises:
        CheckpointError: It cannot be written, or does not decrypt to the victim.
        KeyFileError: The key cannot be written.
    """
    from deepenc.encryption.disk import checkpoint
    from deepenc.encryption.keys.key import save_key

    with replacing(folder):
        checkpoint.save(folder, encrypted, key, victim=source, factory=factory, defense=defense)
        stored = checkpoint.load(folder)
        restored = checkpoint.decrypt_tensors(stored.tensors, key)
        if not all(same(restored[name], tensor) for name, tensor in victim.items()):
            raise CheckpointError(
                f"{folder}: what was written does not decrypt to the victim; is the disk well?"
            )
        passphrase, recipients = openings
        save_key(key, key_file, passphrase, recipients=recipients)
    return stored
