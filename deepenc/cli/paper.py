"""Commands on the paper's own tables: what it printed, beside what comes out here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepenc.cli.console import out
from deepenc.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ROWS = Path(__file__).with_name("table1.yaml")
INPUT = (1, 3, 224, 224)

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """The paper's tables: what it printed, beside what comes out here."""


@dataclass(frozen=True)
class Row:
    """One network of Table 1.

    Attributes:
        network: What the paper calls it.
        sites: How many sites the placement chose.
        count: Confusion channels at each of them.
        before: Parameters of the victim.
        after: Parameters of the encrypted network.
        printed: Both as the paper prints them, in millions.
    """

    network: str
    sites: int
    count: int
    before: int
    after: int
    printed: tuple[str, str]

    @property
    def equal(self) -> bool:
        """Whether both are what the paper prints, to two decimals."""
        return self.printed == (millions(self.before), millions(self.after))


def millions(count: int) -> str:
    """Parameters as the paper prints them."""
    return f"{count / 1e6:.2f}"


def table1(
    parameters_only: Annotated[
        bool, typer.Option("--parameters-only", help="Count parameters; nothing is run on images.")
    ] = False,
) -> None:
    """Table 1: parameters of the paper's 15 ImageNet networks before and after encryption.

    Example: deepenc paper table1 --parameters-only
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not parameters_only:
        raise ConfigError(
            "the accuracies of Table 1 need ImageNet and trained weights, which this command does not take; "
            "give --parameters-only for its parameter columns"
        )
    table = Table(title="Table 1, parameters in millions", box=SIMPLE_HEAD)
    table.title_justify = "left"
    table.add_column("network")
    for column in ("sites", "ΔC each", "before", "paper", "after", "paper", "added"):
        table.add_column(column, justify="right")
    table.add_column("equal")
    missing: list[str] = []
    rows: list[Row] = []
    console = out()
    with console.status("counting"):
        for item in read():
            try:
                row = count(item)
            except ConfigError as error:
                missing.append(f"{item['network']}: {error}")
                continue
            rows.append(row)
            table.add_row(
                row.network,
                str(row.sites),
                str(row.count),
                millions(row.before),
                row.printed[0],
                millions(row.after),
                row.printed[1],
                f"{100 * (row.after / row.before - 1):.2f} %",
                "yes" if row.equal else "NO",
            )
    console.print(table)
    equal = sum(row.equal for row in rows)
    console.print(f"{equal} of {len(rows) + len(missing)} rows are the paper's, to two decimals.")
    for text in missing:
        console.print(f"not counted: {text}", markup=False, soft_wrap=True)
    if equal < len(rows) + len(missing):
        raise typer.Exit(1)


app.command()(table1)


def read() -> list[dict[str, Any]]:
    """The networks of Table 1, with what the paper prints of them and where it put its channels."""
    import yaml

    rows: list[dict[str, Any]] = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    return rows


def count(item: dict[str, Any]) -> Row:
    """Place the channels of one row, and count parameters; the network has no weights.

    Raises:
        ConfigError: The network's library is not installed.
    """
    import numpy as np
    import torch

    from deepenc.encryption.defense import Original
    from deepenc.network.factory import Factory
    from deepenc.network.find import find_sites
    from deepenc.network.surgery import Layout
    from deepenc.plugins import build

    model = Factory.of(item["factory"]).build("meta")
    example = torch.empty(INPUT, device="meta")
    sites = find_sites(model, example)
    placement = build("placement", item["placement"])
    allocation = placement.place(Original(model, tuple(sites), example), np.random.default_rng(0))
    (each,) = set(allocation.values())
    positions = {s.name: tuple(range(allocation[s.name])) for s in sites if s.name in allocation}
    layout = Layout(sites, positions)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return Row(
        item["network"],
        len(allocation),
        each,
        sum(tensor.numel() for tensor in parameters.values()),
        sum(_sizes(parameters, layout)),
        (item["before"], item["after"]),
    )


def _sizes(parameters: dict[str, Tensor], layout: Any) -> Iterator[int]:
    from math import prod

    for name, tensor in parameters.items():
        yield prod(layout.widened_shape(name, tensor.shape))
