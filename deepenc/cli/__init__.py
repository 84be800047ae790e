"""The command line. Commands import what they need when they run, so that ``--help`` answers at once."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import deepenc
from deepenc.cli import inspection, networks, paper, plugins, rotation, runs, tuning
from deepenc.cli.console import complain, out
from deepenc.errors import DeepencError


class _Commands(TyperGroup):
    """Turns what deepenc raises on purpose into a message and an exit code, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DeepencError as error:
            complain(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            complain("stopped; give the same command again to start over")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    name="deepenc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        out().print(f"deepenc {deepenc.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Encrypt trained networks with confusion neurons, let attacks loose on them, read the verdict.

    Start with: deepenc run configs/quickstart.yaml
    """
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


for _command in (
    networks.encrypt,
    networks.decrypt,
    rotation.rotate,
    inspection.inspect,
    runs.run,
    runs.report,
    tuning.tune,
    plugins.list_plugins,
    plugins.check,
):
    app.command(name="list" if _command is plugins.list_plugins else None)(_command)

app.add_typer(paper.app, name="paper")


def main() -> None:
    """Entry point of the ``deepenc`` command."""
    app()
