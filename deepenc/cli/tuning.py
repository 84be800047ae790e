"""The command tune."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepenc.cli.console import WIDTH, out
from deepenc.errors import StoreError

if TYPE_CHECKING:
    from deepenc.arena.estimates.estimate import Estimate
    from deepenc.study.search import Search
    from deepenc.study.tuning import Tuned

TABLES = "tuning.txt"


def tune(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/tune_digits.yaml.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the study. Default: runs/ and the config's name.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that fight trials. Default: the config's.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Instead of the config's trials in all.")] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="Python file with plugins; may be given several times.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="URL of a database for the study. Default: a journal in the folder.")
    ] = None,
) -> None:
    """Search for the best configuration of a defense, and measure it again on keys it has not seen.

    A search that was stopped goes on where it was when the same command is given again.

    Example: deepenc tune configs/tune_digits.yaml --workers 2
    """
    from deepenc.cli.progress import TrialLines, watch
    from deepenc.config import load_search
    from deepenc.plugins import load_file
    from deepenc.study import tuning
    from deepenc.study.outcome import write
    from deepenc.victims.data.cache import cache_folder

    for path in plugin or ():
        load_file(path)
    search = load_search(config)
    if trials is not None:
        search = search.model_copy(update={"trials": trials})
    folder = folder or Path("runs") / search.name
    console = out()
    try:
        with watch(console) as watcher:
            tuned = tuning.tune(
                search,
                folder,
                cache=cache_folder(),
                workers=workers,
                plugin_files=plugin or (),
                database=database,
                progress=TrialLines(console, search),
                watcher=watcher,
            )
    except KeyboardInterrupt:
        console.print(f"Stopped. Finished trials are kept in {folder}; give the same command to go on.")
        raise typer.Exit(130) from None
    _show(search, tuned, console)
    try:
        with (folder / TABLES).open("w", encoding="utf-8") as file:
            _show(search, tuned, Console(file=file, width=WIDTH, highlight=False))
    except OSError as error:
        raise StoreError(f"cannot write {folder / TABLES}: {error.strerror}") from error
    best, *pictures = write(search, tuned.study, [f.defense for f in tuned.finalists], folder)
    console.print(
        f"{tuned.fought} trials run now, in {tuned.seconds:.0f} s.\n"
        f"best      {best}\ntables    {folder / TABLES}\npictures  {len(pictures)} in {folder}",
        markup=False,
    )


def _show(search: Search, tuned: Tuned, console: Console) -> None:
    from collections import Counter

    from deepenc.study.outcome import importances, measured

    states = Counter(trial.state.name.lower() for trial in tuned.study.get_trials(deepcopy=False))
    console.print("trials: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    title = "The front, by its first objective" if len(search.objectives) > 1 else "The best"
    table = Table(
        title=f"{title}; tuned: {search.keys} keys, held-out images; "
        f"fresh: {search.fresh_keys} other keys, the judge's images",
        title_justify="left",
    )
    table.add_column("defense")
    for objective in search.objectives:
        table.add_column(f"{objective}, tuned", justify="right")
        table.add_column(f"{objective}, fresh", justify="right")
    table.add_column("memory", justify="right")
    table.add_column("accuracy lost", justify="right")
    for one in (*tuned.finalists, *tuned.others):
        cells = []
        for place, objective in enumerate(search.objectives):
            searched = one.searched[place] if one.searched else None
            cells += [_said(objective, searched), _said(objective, one.fresh[place])]
        memory = measured("memory", one.memory.mean) if one.memory else ""
        table.add_row(one.defense.name, *cells, memory, _said("damage", one.damage))
    console.print(table)
    for one in tuned.finalists:
        trial = tuned.study.get_trials(deepcopy=False)[one.trial or 0]
        values = ", ".join(f"{field}={value}" for field, value in trial.params.items())
        console.print(f"{one.defense.name}: {values}", markup=False, soft_wrap=True)
    for name, shares in importances(tuned.study).items():
        told = ", ".join(f"{field} {share:.0%}" for field, share in shares.items())
        console.print(f"what {name} depends on: {told}", markup=False, soft_wrap=True)


def _said(objective: str, estimate: Estimate | None) -> str:
    """A mean with its interval over keys, and their number."""
    from deepenc.report.format import ABSENT, bracket
    from deepenc.study.outcome import measured

    if estimate is None:
        return ABSENT
    spread = bracket(estimate, partial(measured, objective))
    return f"{measured(objective, estimate.mean)}{spread} n={estimate.keys}"
