"""Behind ``encrypt --checkpoint`` and ``decrypt --checkpoint``: checkpoints larger than memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deepenc.cli.console import out
from deepenc.cli.release import refuse_key, refuse_published, staged_key
from deepenc.errors import ConfigError, DeepencError, KeyFileError
from deepenc.files import read_file, write_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    from deepenc.encryption.defense import Defense
    from deepenc.encryption.disk.sharded.rewrite import Progress as Told
    from deepenc.encryption.disk.staging import Staged
    from deepenc.encryption.keys.key import Key


def only(folder: str | Path, more: Path | None) -> Path:
    """OUT, which with ``--checkpoint`` comes where otherwise the argument before it does.

    Raises:
        ConfigError: There is one argument too many.
    """
    if more is not None:
        raise ConfigError(f"--checkpoint takes the place of the first argument; leave out one before {more}")
    return Path(folder)


def encrypt(
    source: Path,
    folder: Path,
    key: Path,
    chosen: Defense,
    passphrase: str | None,
    recipients: Sequence[X25519PublicKey] = (),
    *,
    force: bool = False,
) -> None:
    """Encrypt a checkpoint, and save its key before the encrypted folder appears.

    While the work goes on, the secret from which everything is drawn lies beside the key to be, sealed with
    the passphrase (``.NAME.partial``): interrupted, the same command goes on where it was. A key for
    recipients only cannot be opened here, so that the work then starts over.

    Args:
        source: The victim's checkpoint.
        folder: Where to.
        key: File for the key.
        chosen: The defense.
        passphrase: Seals the key; None for recipients only.
        recipients: Public keys that the key is sealed for.
        force: Replace an encrypted folder and a key that are there.

    Raises:
        ConfigError: A key is there already, or an interrupted run was another one.
        KeyFileError: The key cannot be written, or an interrupted run had another passphrase.
        CheckpointError: As `encrypt_checkpoint` raises it, and its others.
    """
    from deepenc.encryption.disk.sharded.checkpoint import encrypt_checkpoint
    from deepenc.encryption.disk.staging import partial_of

    refuse_key(key, folder, force)
    record = key.with_name(f".{key.name}.partial")
    if not partial_of(folder).exists():  # nothing to go on with: a secret is never used for two releases
        record.unlink(missing_ok=True)
    about = {
        "source": str(source.resolve()),
        "folder": str(folder.resolve()),
        "defense": json.dumps(chosen.spec(), sort_keys=True),
    }
    secret = os.urandom(32) if passphrase is None else _secret(record, passphrase, about)

    with ExitStack() as held, _progress("encrypting") as progress:

        def keep(made: Key) -> Staged:
            sealed_for = passphrase, recipients
            return held.enter_context(staged_key(made, key, sealed_for, folder, force))

        try:
            made = encrypt_checkpoint(
                source, folder, chosen, secret=secret, keep=keep, replace_target=force, progress=progress
            )
        except DeepencError:
            if not partial_of(folder).exists():  # nothing is left to go on with
                record.unlink(missing_ok=True)
            raise
    record.unlink(missing_ok=True)
    console = out()
    console.print(
        f"{source} encrypted with {chosen.name}: {sum(made.allocation.values())} confusion channels at "
        f"{len(made.positions)} sites, key of {made.entropy:.1f} bits.",
        markup=False,
    )
    console.print(f"network  {folder}\nkey      {key} (sealed; keep it apart from the network)", markup=False)


def decrypt(
    source: Path,
    key: Path,
    folder: Path,
    passphrase: str | None,
    identity: X25519PrivateKey | None = None,
) -> None:
    """Decrypt a checkpoint into a folder of the same files as the victim's.

    Args:
        source: The encrypted checkpoint.
        key: Its key.
        folder: Where to; must not exist yet, or be empty.
        passphrase: The key's, or None.
        identity: A recipient's private key, or None.

    Raises:
        KeyFileError: The key does not open, or is another network's.
        CheckpointError: As `decrypt_checkpoint` raises it.
    """
    from deepenc.encryption.disk.sharded.checkpoint import decrypt_checkpoint, sites_of
    from deepenc.encryption.keys.key import load_key

    refuse_published(folder, source, "the victim")
    made = load_key(key, passphrase, sites_of(source), identity=identity)
    with _progress("decrypting") as progress:
        decrypt_checkpoint(source, made, folder, progress=progress)
    out().print(f"Checked: the encrypted tensors are those of the key.\nvictim   {folder}", markup=False)


def _secret(record: Path, passphrase: str, about: dict[str, str]) -> bytes:
    """The secret of an interrupted run, or a new one, sealed into the record before it is used."""
    from deepenc.encryption.keys.sealing import lock, unlock

    try:
        if not record.exists():
            secret = os.urandom(32)
            data = lock(json.dumps(about | {"secret": secret.hex()}).encode(), passphrase)
            write_whole(record, data, private=True)
            return secret
        content = json.loads(unlock(read_file(record, 2**16), passphrase))
    except OSError as error:
        raise KeyFileError(
            f"cannot write beside the key to be, {record}: {error.strerror}; give a path in a writable folder"
        ) from error
    except KeyFileError as error:
        raise KeyFileError(
            f"{record} is of an interrupted encryption, but does not open: {error}. Give the passphrase of "
            "that run to go on, or remove the file to start over"
        ) from error
    if any(content.get(name) != value for name, value in about.items()):
        raise ConfigError(
            f"{record} is of the interrupted work on {content.get('source')} to {content.get('folder')}: "
            "give the same command to finish that, or remove the file to start over"
        )
    return bytes.fromhex(content["secret"])


@contextmanager
def _progress(what: str) -> Iterator[Told | None]:
    console = out()
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
