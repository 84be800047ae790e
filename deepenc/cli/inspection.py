"""The command that shows sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb, log2
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepenc.cli.console import out
from deepenc.cli.options import (
    DEFENSE,
    PluginOption,
    ScopeOption,
    StreamsOption,
    defense_named,
    load_plugins,
    source_named,
)
from deepenc.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from deepenc.network.find import LeftOut
    from deepenc.network.sites import Site


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="VICTIM|FOLDER", help="A victim, or the folder of an encrypted network.")
    ],
    defense: Annotated[str | None, DEFENSE] = None,
    why: Annotated[bool, typer.Option("--why", help="Say why the other layers are no sites.")] = False,
    scope: ScopeOption = "",
    streams: StreamsOption = False,
    plugin: PluginOption = None,
) -> None:
    """Show where confusion channels can go, or are: sites, widths, memory, key bits.

    Example: deepenc inspect digits-resnet --defense paper-samp --why
    """
    load_plugins(plugin)
    if what and Path(what).is_dir():
        if defense is not None or why or scope or streams:
            raise ConfigError(
                f"{what} is an encrypted network: --defense, --why, --scope and --streams are for victims; "
                "leave them out"
            )
        _inspect_folder(Path(what))
    else:
        _inspect_victim(what, defense, why, streams, scope)


def _inspect_folder(folder: Path) -> None:
    from deepenc.encryption.disk import checkpoint
    from deepenc.encryption.disk.header import HEADER, read_header
    from deepenc.encryption.disk.sharded.shards import INDEX

    whole = not (folder / INDEX).exists()  # of a network in several files the header must do
    stored = checkpoint.load(folder) if whole else read_header(folder / HEADER)
    spec = stored.victim or {}
    named = spec.get("factory", spec.get("name", "an unknown victim"))  # an own network goes by what makes it
    victim = named if isinstance(named, str) else str(stored.factory)
    title = f"{folder}: {victim} encrypted with {stored.defense.get('name', 'an unknown defense')}"
    _show(title, stored.sites, stored.allocation, None, stored.memory)


def _inspect_victim(spec: str, defense: str | None, why: bool, streams: bool, scope: str) -> None:
    import numpy as np

    from deepenc.encryption.cost.costs import memory
    from deepenc.encryption.defense import Original
    from deepenc.encryption.tensors import tensors_of
    from deepenc.network.find import analyse
    from deepenc.victims.data.cache import cache_folder

    try:
        source = source_named(spec)
    except PluginError as error:
        raise PluginError(f"{error}. There is no folder {spec!r} either") from error
    chosen = None if defense is None else defense_named(defense)
    model, example = source.network(cache_folder())
    found = analyse(model, example, streams=streams, scope=scope)
    tensors = tensors_of(model, found.sites)
    allocation = None
    ratio = None
    if chosen is not None and chosen.placement is not None and found.sites:
        original = Original(model, found.sites, example)
        allocation = chosen.placement.place(original, np.random.default_rng(0))
        ratio = memory(tensors, found.sites, allocation).ratio
    price = {site.name: memory(tensors, found.sites, {site.name: 1}).extra_bits // 8 for site in found.sites}
    size = memory(tensors, found.sites, {}).bits / 8
    title = f"{source.label}: {len(found.sites)} sites, {size / 2**20:.2f} MiB"
    _show(title if chosen is None else f"{title}; {chosen.name}", found.sites, allocation, price, ratio)
    if why:
        _explain(found.left_out)


def _show(
    title: str,
    sites: Sequence[Site],
    allocation: Mapping[str, int] | None,
    price: Mapping[str, int] | None,
    ratio: float | None,
) -> None:
    """Print a table of sites.

    Args:
        title: Above it.
        sites: The victim's sites.
        allocation: Confusion channels per site, where there are any.
        price: Bytes that one confusion channel costs at each site, where the victim is at hand.
        ratio: Measured ΔMem / Mem.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), box=SIMPLE_HEAD, show_footer=allocation is not None)
    table.title_justify = "left"
    counts = [(allocation or {}).get(site.name, 0) for site in sites]
    bits = [log2(comb(site.width + count, count)) for site, count in zip(sites, counts, strict=True)]
    table.add_column("site", footer="all")
    table.add_column("width C", justify="right", footer=str(sum(site.width for site in sites)))
    table.add_column("tensors", justify="right")
    if price is not None:
        table.add_column("bytes a channel", justify="right")
    if allocation is not None:
        table.add_column("ΔC", justify="right", footer=str(sum(counts)))
        table.add_column("key bits", justify="right", footer=f"{sum(bits):.1f}")
    for site, count, entropy in zip(sites, counts, bits, strict=True):
        row = [escape(site.name), str(site.width), str(len({slot.tensor for slot in site.slots}))]
        if price is not None:
            row.append(str(price[site.name]))
        if allocation is not None:
            row += [str(count), f"{entropy:.1f}"]
        table.add_row(*row)
    console = out()
    console.print(table)
    if ratio is not None:
        console.print(f"memory +{100 * ratio:.2f} % of the victim's")


def _explain(left_out: Sequence[LeftOut]) -> None:
    console = out()
    console.print("Left out:" if left_out else "No layer was left out.")
    reasons: dict[str, list[str]] = {}
    for item in left_out:
        reasons.setdefault(item.layer, []).append(f"{item.channels} channels: {item.reason}")
    for layer, parts in reasons.items():
        console.print(f"  {layer}, {'; '.join(parts)}", markup=False, soft_wrap=True)
