"""What several commands take: the victim, and how keys are sealed and opened."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepenc.errors import ConfigError, KeyFileError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    from deepenc.encryption.defense import Defense
    from deepenc.victims.victim import VictimSource

ENVIRONMENT = "DEEPENC_PASSPHRASE"

VictimArgument = Annotated[
    str,
    typer.Argument(
        help="A victim: a name of `deepenc list victims`, or name:field=value,... Or any network: "
        "torchvision:NAME, timm:NAME, transformers:CLASS, or a function of your own, module:function."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there. A replaced key is lost.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        metavar="DIR",
        help="Folder of a checkpoint of transformers, of any size, instead of the first argument; OUT is "
        "then a folder of the same files.",
    ),
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        help=f"File whose first line is the key's passphrase. Default: ${ENVIRONMENT}, or a question."
    ),
]
RecipientOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="PEM file with an X25519 public key, whose owner may open the key; may be repeated. The key "
        "then gets a passphrase only from --passphrase-file."
    ),
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        help="PEM file with a recipient's X25519 private key, which opens the key instead of a passphrase. "
        "--passphrase-file is then for the PEM file, if that is encrypted."
    ),
]
ScopeOption = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="Submodule in which alone to look for sites, as in detectors: backbone.body.",
    ),
]
StreamsOption = Annotated[
    bool, typer.Option("--streams", help="Widen residual streams, too, which the paper does not.")
]


PluginOption = Annotated[
    list[Path] | None, typer.Option(help="Python file with plugins; may be given several times.")
]
DEFENSE = typer.Option(
    help="A name of `deepenc list defenses`, or a YAML file with a defense, such as the best.yaml of "
    "`deepenc tune`; of a file with several, FILE:NAME."
)


def load_plugins(files: Sequence[Path] | None) -> None:
    """Register the plugins of the user's files."""
    from deepenc.plugins import load_file

    for path in files or ():
        load_file(path)


def defense_named(text: str) -> Defense:
    """The defense that is meant: a registered one, or one described in a YAML file.

    Raises:
        PluginError: No registered defense has the name.
        ConfigError: The file cannot be read, or does not say which defense is meant.
    """
    from deepenc.encryption.defense import Defense
    from deepenc.plainyaml import read_file

    file, _, wanted = text.partition(":")
    if not file.endswith((".yaml", ".yml")):
        return Defense.of(text)
    content, _ = read_file(Path(file))
    listed = content.get("defenses", [content]) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise ConfigError(f"{file}: expected a defense, or a list of `defenses`; see configs/frontier.yaml")
    found = [Defense.of(spec) for spec in listed]
    named = [one for one in found if (one.name == wanted if wanted else one.protects)]
    if len(named) != 1:
        names = ", ".join(one.name for one in found) or "none"
        raise ConfigError(f"{file}: say which defense is meant, as {file}:NAME; it has {names}")
    return named[0]


def source_named(text: str) -> VictimSource:
    """The victim that is meant; a function of the user's own may lie in the folder they are in."""
    from deepenc.victims.victim import source_of

    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    return source_of(text)


def openings(
    file: Path | None, recipients: Sequence[Path] | None
) -> tuple[str | None, list[X25519PublicKey]]:
    """What a new key is sealed with: a passphrase, recipients, or both.

    A passphrase that happens to be in the environment is not added to recipients: it may be the weaker way.
    """
    from deepenc.encryption.keys.recipients import read_recipient

    keys = [read_recipient(path) for path in recipients or ()]
    return None if keys and file is None else _passphrase(file, new=True), keys


def opening(
    file: Path | None, identity: Path | None, key: Path
) -> tuple[str | None, X25519PrivateKey | None]:
    """What a sealed key is opened with: its passphrase, or a recipient's private key.

    Raises:
        KeyFileError: The key is not there, or takes no passphrase where no private key is given.
    """
    from deepenc.encryption.keys.key import read_key
    from deepenc.encryption.keys.recipients import is_encrypted, read_identity
    from deepenc.encryption.keys.sealing import ONLY_RECIPIENTS, takes_passphrase

    if identity is None:
        if not takes_passphrase(read_key(key)):
            raise KeyFileError(ONLY_RECIPIENTS)
        return _passphrase(file, new=False), None
    passphrase = _passphrase(file, new=False) if is_encrypted(identity) else None
    return None, read_identity(identity, passphrase)


def _passphrase(file: Path | None, *, new: bool) -> str:
    """The key's passphrase: from a file, the environment, or the terminal.

    Raises:
        KeyFileError: The file cannot be read.
        ConfigError: None is given, and nobody can be asked.
    """
    if file is not None:
        try:
            with file.open("rb") as lines:  # a pipe, too: <(pass show owner)
                passphrase = lines.readline(2**16).decode().removesuffix("\n").removesuffix("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"cannot read a passphrase from {file}: {error}") from error
    elif ENVIRONMENT in os.environ:
        passphrase = os.environ[ENVIRONMENT]
    elif sys.stdin.isatty():
        passphrase = typer.prompt("Passphrase of the key", hide_input=True, confirmation_prompt=new)
    else:
        raise ConfigError(
            f"no passphrase for the key: give --passphrase-file, or set {ENVIRONMENT}, or use a terminal"
        )
    if not passphrase:
        raise ConfigError("the passphrase is empty; choose one that cannot be guessed")
    return str(passphrase)
