"""Commands on a run: run, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deepenc.cli.console import WIDTH, complain, out
from deepenc.errors import StoreError

if TYPE_CHECKING:
    from deepenc.arena.record import Record

CSV, TABLES = "records.csv", "report.txt"

SQLITE = b"SQLite format 3\0"
"""How every SQLite database begins."""


class Device(StrEnum):
    """Where networks are evaluated and attacks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def run(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run. Default: runs/ and the config's name.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each of one thread.")] = 1,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file with plugins; may be given several times.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run cells again that failed or met --timeout.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that an attack may take; it is stopped then.")
    ] = None,
    device: Annotated[Device | None, typer.Option(help="Instead of the config's device.")] = None,
) -> None:
    """Let every attack loose on every defense of a config, and show what each really got.

    A run that was stopped goes on where it was when the same command is given again.

    Example: deepenc run configs/quickstart.yaml --workers 2
    """
    from deepenc.arena.run import matrix
    from deepenc.arena.run.matrix import OUTPUT, cells_are
    from deepenc.cli.progress import watch
    from deepenc.config import load
    from deepenc.plugins import load_file
    from deepenc.victims.data.cache import cache_folder

    for path in plugin or ():
        load_file(path)
    experiment = load(config)
    if device is not None:
        experiment = experiment.model_copy(update={"device": device.value})
    folder = folder or Path("runs") / experiment.name
    console = out()
    try:
        with watch(console) as progress:
            summary = matrix.run(
                experiment,
                folder,
                cache=cache_folder(),
                workers=workers,
                plugin_files=plugin or (),
                progress=progress,
                retry_failed=retry_failed,
                timeout=timeout,
            )
    except KeyboardInterrupt:
        console.print(f"Stopped. Finished cells are kept in {folder}; give the same command to go on.")
        raise typer.Exit(130) from None
    records, _ = _read(folder)
    _show(records, console)
    _write(records, folder)
    if summary.kept:
        console.print(
            f"{cells_are(summary.kept)} kept in {folder} that are not of this configuration.", markup=False
        )
    console.print(
        f"{summary.run} of {sum(summary.states.values())} cells run now, in {summary.seconds:.0f} s.\n"
        f"report   {folder / TABLES}\nrecords  {folder / CSV}",
        markup=False,
    )
    if (printed := folder / OUTPUT).exists():
        console.print(f"printed  {printed}", markup=False)
    if summary.problems:
        complain("; ".join(summary.problems))
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    csv: Annotated[Path | None, typer.Option(help="Write all records to this CSV file as well.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write tables to this Markdown file as well.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw heat maps and curves into this folder.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Which defense is better, which attack stronger, and what ties.")
    ] = False,
) -> None:
    """Show the tables of a run, finished or not.

    Example: deepenc report runs/quickstart --csv quickstart.csv
    """
    from deepenc.arena.run.matrix import cells_are
    from deepenc.report.export import write_csv
    from deepenc.report.markdown import write_markdown

    _refuse_own_files(folder, csv, allowed=CSV)
    _refuse_own_files(folder, markdown)
    records, open_cells = _read(folder)
    console = out()
    _show(records, console)
    if compare:
        from deepenc.report.comparison import comparisons

        console.print(comparisons(records))
    if open_cells:
        console.print(
            f"{cells_are(open_cells)} not finished: give the command of the run again.", markup=False
        )
    if csv is not None:
        console.print(f"{write_csv(records, csv)} records written to {csv}", markup=False)
    if markdown is not None:
        write_markdown(records, markdown, compare=compare)
        console.print(f"tables written to {markdown}", markup=False)
    if figures is not None:
        from deepenc.report.figures import write_figures

        for path in write_figures(records, figures):
            console.print(f"picture written to {path}", markup=False)


def _refuse_own_files(folder: Path, target: Path | None, allowed: str = "") -> None:
    """Keep a table from being written over a run.

    Raises:
        StoreError: The file is one that a run keeps, of this run or of another.
    """
    from deepenc.arena.run.matrix import DATABASE, OUTPUT

    if target is None:
        return
    own = tuple({CSV, TABLES, OUTPUT, DATABASE} - {allowed})
    beside = target.resolve().parent == folder.resolve() and target.name.startswith(own)
    try:
        with target.open("rb") as file:
            database = file.read(len(SQLITE)) == SQLITE
    except OSError:
        database = False
    if beside or database:
        raise StoreError(f"{target} is a file that a run keeps; choose another name")


def _read(folder: Path) -> tuple[list[Record], int]:
    """The records of a run, and how many of its cells are not finished."""
    from deepenc.arena.run.matrix import DATABASE
    from deepenc.arena.run.store import Store

    with Store(folder / DATABASE, create=False) as store:
        records = store.records()
        return records, len(store.states()) - len(records)


def _show(records: list[Record], console: Console) -> None:
    from deepenc.report.tables import report as tables

    console.print(tables(records))


def _write(records: list[Record], folder: Path) -> None:
    """Leave the tables and the records in the run's folder, for people without deepenc."""
    from deepenc.report.export import write_csv

    write_csv(records, folder / CSV)
    try:
        with (folder / TABLES).open("w", encoding="utf-8") as file:
            _show(records, Console(file=file, width=WIDTH, highlight=False))
    except OSError as error:
        raise StoreError(f"cannot write {folder / TABLES}: {error.strerror}") from error
