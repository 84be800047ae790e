"""Commands on one network: encrypt and decrypt."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from deepenc.cli import checkpoints
from deepenc.cli.console import out
from deepenc.cli.options import (
    DEFENSE,
    CheckpointOption,
    ForceOption,
    IdentityOption,
    PassphraseOption,
    PluginOption,
    RecipientOption,
    ScopeOption,
    StreamsOption,
    VictimArgument,
    defense_named,
    load_plugins,
    opening,
    openings,
    source_named,
)
from deepenc.cli.release import refuse_folder, refuse_key, refuse_tensors, what_is_left, write_release
from deepenc.errors import ConfigError

log = logging.getLogger(__name__)


def encrypt(
    victim: VictimArgument,
    key: Annotated[Path, typer.Option(help="File for the key, sealed with the passphrase.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for the encrypted network.")
    ] = None,
    checkpoint_folder: CheckpointOption = None,
    defense: Annotated[str, DEFENSE] = "paper-samp",
    scope: ScopeOption = "",
    streams: StreamsOption = False,
    recipient: RecipientOption = None,
    passphrase_file: PassphraseOption = None,
    plugin: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Encrypt a network: write it with confusion channels, and the key that removes them.

    Example: deepenc encrypt digits-resnet stolen/ --defense paper-samp --key owner.key
    Larger than memory: deepenc encrypt --checkpoint llama/ stolen/ --key owner.key
    """
    load_plugins(plugin)
    chosen = defense_named(defense)
    if checkpoint_folder is not None:
        target = checkpoints.only(victim, folder)
        refuse_folder(target, force)
        checkpoints.encrypt(
            checkpoint_folder, target, key, chosen, *openings(passphrase_file, recipient), force=force
        )
        return
    if folder is None:
        raise ConfigError("expected a victim and a folder for the encrypted network; give OUT, too")
    from deepenc.encryption.encrypt import encrypt as make
    from deepenc.victims.data.cache import cache_folder

    source = source_named(victim)
    refuse_folder(folder, force)
    refuse_key(key, folder, force)
    if chosen.placement is None:
        raise ConfigError(
            f"the defense {chosen.name!r} inserts nothing, and would release the victim as it is"
        )
    sealed_for = openings(passphrase_file, recipient)
    model, example = source.network(cache_folder())
    if source.random:
        log.warning("%s: random weights, so that there is nothing to protect; give `weights`", source.label)
    data = source.load(cache_folder()).defender.inputs if chosen.wants_data else None
    encrypted, made = make(model, example, chosen, streams=streams, scope=scope, data=data)
    stored = write_release(
        folder,
        encrypted,
        made,
        key,
        victim=model.state_dict(),
        openings=sealed_for,
        source=source.spec(),
        factory=source.structure(),
        defense=chosen.spec(),
        force=force,
    )
    console = out()
    console.print(
        f"{source.label} encrypted with {chosen.name}: {sum(made.allocation.values())} confusion "
        f"channels at {len(made.positions)} sites, memory +{100 * stored.memory:.2f} %, "
        f"key of {made.entropy:.1f} bits.",
        markup=False,
    )
    console.print("Checked: what was written decrypts to the victim, bit for bit.")
    console.print(what_is_left(source, model, encrypted, example))
    console.print(f"network  {folder}\nkey      {key} (sealed; keep it apart from the network)", markup=False)


def decrypt(
    folder: Annotated[Path, typer.Argument(help="Folder of an encrypted network.")],
    key: Annotated[Path, typer.Argument(help="Its key.")],
    target: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="File for the victim's tensors (safetensors).")
    ] = None,
    checkpoint_folder: CheckpointOption = None,
    identity: IdentityOption = None,
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Decrypt a network: write the victim's tensors, bit for bit, as a safetensors file.

    Example: deepenc decrypt stolen/ owner.key victim.safetensors
    Larger than memory: deepenc decrypt --checkpoint stolen/ owner.key victim/
    """
    from deepenc.encryption.disk import checkpoint
    from deepenc.encryption.keys.key import load_key

    if checkpoint_folder is not None:
        target, key = checkpoints.only(key, target), folder
        checkpoints.decrypt(checkpoint_folder, key, target, *opening(passphrase_file, identity, key))
        return
    if target is None:
        raise ConfigError("expected a folder, its key, and a file for the tensors; give OUT, too")
    refuse_tensors(target, folder, [key, identity, passphrase_file], force)
    stored = checkpoint.load(folder)
    passphrase, opener = opening(passphrase_file, identity, key)
    made = load_key(key, passphrase, stored.sites, identity=opener)
    restored = checkpoint.decrypt_tensors(stored.tensors, made)
    checkpoint.write_tensors(target, restored)
    out().print(f"{len(restored)} tensors of the victim written to {target}", markup=False)
