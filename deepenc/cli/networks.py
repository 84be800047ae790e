"""Commands on one network: encrypt, decrypt, inspect."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb, log2
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepenc.cli.console import out
from deepenc.errors import CheckpointError, ConfigError, KeyFileError, PluginError

if TYPE_CHECKING:
    from deepenc.network.find import LeftOut
    from deepenc.network.sites import Site

ENVIRONMENT = "DEEPENC_PASSPHRASE"

VictimArgument = Annotated[
    str, typer.Argument(help="A victim: a name of `deepenc list victims`, or name:field=value,...")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there. A replaced key is lost.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        help=f"File whose first line is the key's passphrase. Default: ${ENVIRONMENT}, or a question."
    ),
]


def encrypt(
    victim: VictimArgument,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the encrypted network.")],
    key: Annotated[Path, typer.Option(help="File for the key, sealed with the passphrase.")],
    defense: Annotated[str, typer.Option(help="A name of `deepenc list defenses`.")] = "paper-samp",
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Encrypt a network: write it with confusion channels, and the key that removes them.

    Example: deepenc encrypt digits-resnet stolen/ --defense paper-samp --key owner.key
    """
    from deepenc.config import cache_folder
    from deepenc.encryption import checkpoint
    from deepenc.encryption.defense import Defense
    from deepenc.encryption.encrypt import encrypt as make
    from deepenc.encryption.key import save_key
    from deepenc.plugins import build

    source, chosen = build("victim", victim), Defense.of(defense)
    _refuse_to_replace(key, force)
    _refuse_to_replace(folder, force)
    passphrase = _passphrase(passphrase_file, new=True)
    model, example = source.network(cache_folder())
    encrypted, made = make(model, example, chosen)
    with _replacing(folder):
        checkpoint.save(folder, encrypted, made, victim=source.spec(), defense=chosen.spec())
        stored = checkpoint.load(folder)
        restored = checkpoint.decrypt_tensors(stored.tensors, made)
        if not all(_same(restored[name], tensor) for name, tensor in model.state_dict().items()):
            raise CheckpointError(
                f"{folder}: what was written does not decrypt to the victim; is the disk well?"
            )
        save_key(made, key, passphrase)
    console = out()
    console.print(
        f"{source.label} encrypted with {chosen.name}: {sum(made.configuration.values())} confusion "
        f"channels at {len(made.positions)} sites, memory +{100 * stored.memory:.2f} %, "
        f"key of {made.entropy:.1f} bits.",
        markup=False,
    )
    console.print("Checked: what was written decrypts to the victim, bit for bit.")
    console.print(f"network  {folder}\nkey      {key} (sealed; keep it apart from the network)", markup=False)


def decrypt(
    folder: Annotated[Path, typer.Argument(help="Folder of an encrypted network.")],
    key: Annotated[Path, typer.Argument(help="Its key.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File for the victim's tensors (safetensors).")
    ],
    passphrase_file: PassphraseOption = None,
    force: ForceOption = False,
) -> None:
    """Decrypt a network: write the victim's tensors, bit for bit, as a safetensors file.

    Example: deepenc decrypt stolen/ owner.key victim.safetensors
    """
    from deepenc.encryption import checkpoint
    from deepenc.encryption.key import load_key

    _refuse_to_replace(target, force)
    stored = checkpoint.load(folder)
    made = load_key(key, _passphrase(passphrase_file, new=False), stored.sites)
    checkpoint.write_tensors(target, checkpoint.decrypt_tensors(stored.tensors, made))
    out().print(f"{len(stored.tensors)} tensors of the victim written to {target}", markup=False)


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="VICTIM|FOLDER", help="A victim, or the folder of an encrypted network.")
    ],
    defense: Annotated[
        str | None, typer.Option(help="Show what this defense would insert into a victim.")
    ] = None,
    why: Annotated[bool, typer.Option("--why", help="Say why the other layers are no sites.")] = False,
) -> None:
    """Show where confusion channels can go, or are: sites, widths, memory, key bits.

    Example: deepenc inspect digits-resnet --defense paper-samp --why
    """
    if Path(what).is_dir():
        if defense is not None or why:
            raise ConfigError(
                f"{what} is an encrypted network: --defense and --why are for victims; leave them out"
            )
        _inspect_folder(Path(what))
    else:
        _inspect_victim(what, defense, why)


def _inspect_folder(folder: Path) -> None:
    from deepenc.encryption import checkpoint

    stored = checkpoint.load(folder)
    victim = stored.victim["name"] if stored.victim else "an unknown victim"
    title = f"{folder}: {victim} encrypted with {stored.defense.get('name', 'an unknown defense')}"
    _show(title, stored.sites, stored.configuration, None, stored.memory)


def _inspect_victim(spec: str, defense: str | None, why: bool) -> None:
    import numpy as np

    from deepenc.config import cache_folder
    from deepenc.encryption.defense import Defense, Original
    from deepenc.encryption.objective import memory
    from deepenc.network.find import analyse
    from deepenc.plugins import build

    try:
        source = build("victim", spec)
    except PluginError as error:
        raise PluginError(f"{error}. There is no folder {spec!r} either") from error
    chosen = None if defense is None else Defense.of(defense)
    model, example = source.network(cache_folder())
    found = analyse(model, example)
    tensors = model.state_dict()
    configuration = None
    ratio = None
    if chosen is not None and chosen.placement is not None and found.sites:
        original = Original(model, found.sites, example)
        configuration = chosen.placement.place(original, np.random.default_rng(0))
        ratio = memory(tensors, found.sites, configuration).ratio
    price = {site.name: memory(tensors, found.sites, {site.name: 1}).extra_bits // 8 for site in found.sites}
    size = memory(tensors, found.sites, {}).bits / 8
    title = f"{source.label}: {len(found.sites)} sites, {size / 2**20:.2f} MiB"
    _show(title if chosen is None else f"{title}; {chosen.name}", found.sites, configuration, price, ratio)
    if why:
        _explain(found.left_out)


def _show(
    title: str,
    sites: Sequence[Site],
    configuration: Mapping[str, int] | None,
    price: Mapping[str, int] | None,
    ratio: float | None,
) -> None:
    """Print a table of sites.

    Args:
        title: Above it.
        sites: The victim's sites.
        configuration: Confusion channels per site, where there are any.
        price: Bytes that one confusion channel costs at each site, where the victim is at hand.
        ratio: Measured ΔMem / Mem.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), box=SIMPLE_HEAD, show_footer=configuration is not None)
    table.title_justify = "left"
    counts = [(configuration or {}).get(site.name, 0) for site in sites]
    bits = [log2(comb(site.width + count, count)) for site, count in zip(sites, counts, strict=True)]
    table.add_column("site", footer="all")
    table.add_column("width C", justify="right", footer=str(sum(site.width for site in sites)))
    table.add_column("tensors", justify="right")
    if price is not None:
        table.add_column("bytes a channel", justify="right")
    if configuration is not None:
        table.add_column("ΔC", justify="right", footer=str(sum(counts)))
        table.add_column("key bits", justify="right", footer=f"{sum(bits):.1f}")
    for site, count, entropy in zip(sites, counts, bits, strict=True):
        row = [escape(site.name), str(site.width), str(len({slot.tensor for slot in site.slots}))]
        if price is not None:
            row.append(str(price[site.name]))
        if configuration is not None:
            row += [str(count), f"{entropy:.1f}"]
        table.add_row(*row)
    console = out()
    console.print(table)
    if ratio is not None:
        console.print(f"memory +{100 * ratio:.2f} % of the victim's")


def _explain(left_out: Sequence[LeftOut]) -> None:
    console = out()
    console.print("Left out:" if left_out else "No layer was left out.")
    for item in left_out:
        text = f"  {item.layer} ({item.channels} channels): {item.reason}"
        console.print(text, markup=False, soft_wrap=True)


def _same(first: Any, second: Any) -> bool:
    import torch

    return first.dtype == second.dtype and torch.equal(first, second)


def _refuse_to_replace(path: Path, force: bool) -> None:
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not force:
        raise ConfigError(f"{path} exists already; give another path, or --force to replace it")
    if taken and path.is_dir() and not (path / "deepenc.json").is_file():
        raise ConfigError(f"{path} holds something other than an encrypted network; give another path")


@contextmanager
def _replacing(folder: Path) -> Iterator[None]:
    """Keep an old folder aside until a new one is complete; put it back where that fails."""
    aside = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.old")
    try:
        if folder.exists():
            folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"cannot replace {folder}: {error.strerror}; give another folder") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _passphrase(file: Path | None, *, new: bool) -> str:
    """The key's passphrase: from a file, the environment, or the terminal.

    Raises:
        KeyFileError: The file cannot be read.
        ConfigError: None is given, and nobody can be asked.
    """
    if file is not None:
        try:
            passphrase = file.read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r")
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
