"""The command that gives an encrypted network a new key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepenc.cli.console import out
from deepenc.cli.options import (
    ForceOption,
    IdentityOption,
    PassphraseOption,
    PluginOption,
    RecipientOption,
    defense_named,
    load_plugins,
    opening,
    openings,
    source_named,
)
from deepenc.cli.release import refuse_folder, refuse_key, write_release
from deepenc.errors import ConfigError

if TYPE_CHECKING:
    from deepenc.victims.victim import VictimSource


def rotate(
    folder: Annotated[Path, typer.Argument(help="Folder of an encrypted network.")],
    key: Annotated[Path, typer.Argument(help="Its key.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the network under its new key.")],
    new_key: Annotated[Path, typer.Argument(metavar="NEW_KEY", help="File for the new key.")],
    defense: Annotated[
        str | None,
        typer.Option(
            help="Encrypt with this defense, named as for `encrypt`. Default: the old one, as many channels "
            "at each site."
        ),
    ] = None,
    victim: Annotated[
        str | None, typer.Option(help="The victim, for its structure. Default: what the folder says.")
    ] = None,
    identity: IdentityOption = None,
    recipient: RecipientOption = None,
    passphrase_file: PassphraseOption = None,
    new_passphrase_file: Annotated[
        Path | None,
        typer.Option(help="As --passphrase-file, for the new key. Default: the passphrase of the old key."),
    ] = None,
    plugin: PluginOption = None,
    force: ForceOption = False,
) -> None:
    """Give an encrypted network a new key: other positions, other confusion weights, the same victim inside.

    Withdraw the old release first: whoever holds both networks can tell the victim's channels (docs/keys.md).

    Example: deepenc rotate released/ owner.key released2/ owner2.key
    """
    from deepenc.encryption.defense import Defense
    from deepenc.encryption.disk import checkpoint
    from deepenc.encryption.encrypt import decrypt, encrypt, reshelter
    from deepenc.encryption.keys.key import load_key
    from deepenc.victims.data.cache import cache_folder

    load_plugins(plugin)
    if target.resolve() == folder.resolve() or new_key.resolve() == key.resolve():
        raise ConfigError("the old network and key are read until the new ones are whole; give other paths")
    refuse_folder(target, force)
    refuse_key(new_key, target, force)
    stored = checkpoint.load(folder)
    passphrase, opener = opening(passphrase_file, identity, key)
    old = load_key(key, passphrase, stored.sites, identity=opener)
    if recipient or new_passphrase_file is not None or passphrase is None:
        sealed_for = openings(new_passphrase_file, recipient)
    else:
        sealed_for = passphrase, []
    source = _victim(victim, stored.victim)
    structure, example = source.network(cache_folder())
    original = decrypt(stored.network(structure), old)
    chosen = Defense.of(stored.defense) if defense is None else defense_named(defense)
    if chosen.placement is None:
        raise ConfigError(
            f"the defense {chosen.name!r} inserts nothing, and would release the victim as it is"
        )
    data = source.load(cache_folder()).defender.inputs if chosen.wants_data else None
    if defense is None:
        encrypted, made = reshelter(original, old, chosen, example=example, rotate=True, data=data)
    else:
        encrypted, made = encrypt(original, example, chosen, sites=stored.sites, data=data)
    write_release(
        target,
        encrypted,
        made,
        new_key,
        victim=checkpoint.decrypt_tensors(stored.tensors, old),
        openings=sealed_for,
        source=stored.victim,
        factory=stored.factory,
        defense=chosen.spec(),
        force=force,
    )
    out().print(
        f"{folder} encrypted again with {chosen.name}: {sum(made.allocation.values())} confusion channels "
        f"at {len(made.positions)} sites, key of {made.entropy:.1f} bits.\n"
        "Checked: both networks decrypt to the same victim, bit for bit.\n"
        f"network  {target}\nkey      {new_key} (sealed; keep it apart from the network)\n"
        "Withdraw the old release before this one goes out: who holds both can tell the victim's channels.",
        markup=False,
    )


def _victim(victim: str | None, saved: Mapping[str, Any] | None) -> VictimSource:
    """The victim, for its structure: the given one, or the one that an encrypted network's header names.

    Raises:
        ConfigError: The header names none, or one that would import code: a header is not trusted so far.
    """
    from deepenc.network.factory import trusted
    from deepenc.plugins import build, parts_of
    from deepenc.victims.victim import VictimSource

    if victim is not None:
        return source_named(victim)
    if saved is None:
        raise ConfigError("the folder does not say which victim it was made from; give it with --victim")
    found: VictimSource = build("victim", saved)
    for part in parts_of(found):  # a victim may be made of another one
        factory = part.structure() if isinstance(part, VictimSource) else None
        if factory is not None and factory.library == "python" and factory.name not in trusted():
            raise ConfigError(
                f"the folder names the function {factory.name!r} as maker of its victim; if you trust it, "
                "give it with --victim"
            )
    return found
