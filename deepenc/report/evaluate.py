"""Is my network safe? A matrix over a network and data in memory, in one call."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deepenc.arena.plan import Experiment
from deepenc.arena.record import Record
from deepenc.arena.run.matrix import DATABASE, run
from deepenc.arena.run.store import Store
from deepenc.errors import ConfigError
from deepenc.report.tables import report as tables
from deepenc.report.verdict import verdicts
from deepenc.tasks.task import Task
from deepenc.victims.data.cache import cache_folder
from deepenc.victims.data.own import as_examples, in_parts
from deepenc.victims.data.splits import fingerprint
from deepenc.victims.sources.given import give
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim

if TYPE_CHECKING:
    from pandas import DataFrame

WIDTH = 120


class Report:
    """What came of a run: prints the verdict; holds all records.

    Attributes:
        duels: The records, as `Record`.
    """

    def __init__(self, duels: Sequence[Record]) -> None:
        self.duels = tuple(duels)

    @property
    def records(self) -> DataFrame:
        """One row a duel: what was run, what came of it, what it cost; see `deepenc.report.export.row`."""
        from pandas import DataFrame

        from deepenc.report.export import COLUMNS, row

        return DataFrame([row(record) for record in self.duels], columns=list(COLUMNS))

    def __str__(self) -> str:
        """The verdict on each defense."""
        return "\n\n".join(verdicts(self.duels)) or "Nothing was measured."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For notebooks: the verdict, and the tables as they are in a terminal."""
        from rich.console import Console

        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_jupyter=False)
        console.print(str(self), markup=False, highlight=False)
        console.print(tables(self.duels))
        return console.export_html(inline_styles=True)


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    task: Task | str = "classification",
    training: Any = None,
    defenses: Sequence[Any] = ("paper-samp", "strong"),
    attacks: str | Sequence[Any] = "quick",
    threats: Sequence[Any] | None = None,
    keys: int = 3,
    seed: int | None = None,
    shares: Sequence[float] = (0.2, 0.4, 0.4),
    scope: str = "",
    streams: bool = False,
    workers: int = 1,
    judge: int | None = None,
    name: str = "mine",
    folder: str | Path | None = None,
) -> Report:
    """Let attacks loose on defenses of your own network.

    The data are shared out by content to the defender, the attacker and the judge; no example is in two
    parts. The network should not have been trained on them.

    Args:
        model: The trained network; copies are worked on.
        data: A map-style torch data set of pairs (input, target), or a pair of tensors (inputs, targets). An
            input is a tensor, a tuple of arguments or a dict of keyword arguments of the network.
        task: What the network is for: a task, its name, or a mapping.
        training: What the network was trained on, in the same forms; the defender's part then.
        defenses: By name, as mappings, or `Defense`.
        attacks: The name of a battery (``quick``, ``standard``, ``all``), or a list of attacks.
        threats: Threat models; needed with a list of attacks.
        keys: Keys for each defense, ``>= 1``; without a second one no interval can be told.
        seed: Makes the run repeatable; whoever guesses it has the keys.
        shares: Of the data for the defender, the attacker and the judge.
        scope: Submodule in which sites are looked for.
        streams: Whether residual streams count as sites.
        workers: Processes.
        judge: Judge's examples at most; default: all.
        name: How tables call the network: letters, digits, ``.``, ``_`` and ``-``.
        folder: Where the run is kept, so that it goes on when it is called again; default: nowhere.

    Raises:
        VictimError: The data do not fit the task or the network; says which example, and what to do.
        ConfigError: An argument is invalid.
        TraceError: The network's operators cannot be followed.
        SiteError: The network has no site.
    """
    chosen = Task.build(task)
    held = as_examples(data, chosen)
    own = None if training is None else as_examples(training, chosen)
    defender, attacker, judged = in_parts(held, own, shares)
    mark = fingerprint(model, defender, attacker, judged)
    victim = Victim(
        name, model.eval(), chosen, defender, attacker, judged, mark, scope=scope, streams=streams
    )
    source = give(validated(victim))
    spec: Mapping[str, Any] = {
        "name": name,
        "victims": [source],
        "defenses": list(defenses),
        "attacks": attacks if isinstance(attacks, str) else list(attacks),
        "keys": keys,
        "seed": seed,
        "judge": judge,
    }
    experiment = _experiment(spec if threats is None else {**spec, "threats": list(threats)})
    if folder is not None:
        return _run(experiment, Path(folder), workers)
    with tempfile.TemporaryDirectory() as temporary:
        return _run(experiment, Path(temporary), workers)


def _experiment(spec: Mapping[str, Any]) -> Experiment:
    from pydantic import ValidationError

    from deepenc.plugins import explain

    try:
        return Experiment.model_validate(spec)
    except ValidationError as error:
        raise ConfigError(explain(error, Experiment.model_fields)) from error


def _run(experiment: Experiment, folder: Path, workers: int) -> Report:
    run(experiment, folder, cache=cache_folder(), workers=workers)
    with Store(folder / DATABASE, create=False) as store:
        return Report(store.records())
