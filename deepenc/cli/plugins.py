"""Commands on plugins: list, check."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from deepenc.cli.console import out
from deepenc.cli.options import PluginOption, load_plugins
from deepenc.errors import PluginError, near


class Kinds(StrEnum):
    """What can be listed."""

    ATTACKS = "attacks"
    DEFENSES = "defenses"
    VICTIMS = "victims"
    PLACEMENTS = "placements"
    WEIGHTS = "weights"
    HARDENINGS = "hardenings"
    TASKS = "tasks"
    BATTERIES = "batteries"

    @property
    def kind(self) -> str:
        """The registry's word for it."""
        odd = {Kinds.WEIGHTS: "weights", Kinds.BATTERIES: "battery"}
        return odd.get(self, self.removesuffix("s"))


def _kinds(text: str) -> Kinds:
    try:
        return Kinds(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: {near(text, [kind.value for kind in Kinds])}") from error


def list_plugins(
    what: Annotated[Kinds, typer.Argument(parser=_kinds, metavar="WHAT", help=f"One of {', '.join(Kinds)}.")],
    plugin: PluginOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="As a table, attacks with what they need and must see.")
    ] = False,
) -> None:
    """List the attacks, defenses or victims that are installed, one line each.

    Example: deepenc list attacks
    """
    from deepenc.plugins import names

    load_plugins(plugin)
    if markdown:
        from deepenc.report import catalogue

        special = {Kinds.ATTACKS: catalogue.attacks, Kinds.BATTERIES: catalogue.batteries}
        table = special[what]() if what in special else catalogue.plugins(what.kind)
        out().print(table, markup=False, soft_wrap=True, end="")
        return
    found = names(what.kind)
    if not found:
        out().print(f"No {what} are installed.")
    width = max(map(len, found), default=0)
    for name in found:
        out().print(f"{name:{width}}  {_line(what.kind, name)}", markup=False, soft_wrap=True)


def _line(kind: str, name: str) -> str:
    """What a plugin says of itself; a broken one must not keep the others from being listed."""
    from deepenc.plugins import get

    try:
        found = get(kind, name)
    except PluginError as error:
        return f"BROKEN: {error}"
    return str(found.summary() if callable(found.summary) else found.summary)


def check(
    what: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A Python file, or a plugin: finetune:lr=0.01.")
    ],
) -> None:
    """Hold plugins to the contract that every attack, victim, placement and the like must keep.

    Example: deepenc check collisions
    """
    from deepenc.arena.checks.apart import run_apart
    from deepenc.arena.checks.contract import Result
    from deepenc.plugins import loaded_files

    console = out()
    faults = 0

    def tell(result: Result) -> None:
        nonlocal faults
        mark, style = ("ok    ", "green") if result.passed else ("FAILED", "bold red")
        console.print(mark if result.checked else "—     ", style=style if result.checked else "", end=" ")
        console.print(f"{result.name}  {result.detail}".rstrip(), markup=False, soft_wrap=True)
        faults += not result.passed and not result.repeated

    for plugin in _plugins(what):
        console.print(f"{plugin.kind} {plugin.name}", style="bold", markup=False)
        run_apart(plugin, tuple(loaded_files()), tell)
    if faults:
        console.print("1 fault found." if faults == 1 else f"{faults} faults found.")
        raise typer.Exit(1)
    console.print("All checks passed.")


def _plugins(what: str) -> list[Any]:
    """The plugins of a file, or all registered ones of a name, with default parameters."""
    from deepenc.plugins import GROUPS, build, get, load_file, names

    if what.endswith(".py") or Path(what).is_file():
        return [build(cls.kind, cls.name) for cls in load_file(what)]
    known = {kind: names(kind) for kind in GROUPS}
    name, _, parameters = what.partition(":")
    kinds = [kind for kind, called in known.items() if name in called]
    if not kinds:
        everything = {name for called in known.values() for name in called}
        raise PluginError(f"no file and no plugin is called {what!r}: {near(name, everything)}")
    if parameters:
        kinds = [kind for kind in kinds if kind not in ("defense", "battery")]  # these have none
    return [get(kind, what) if kind in ("defense", "battery") else build(kind, what) for kind in kinds]
