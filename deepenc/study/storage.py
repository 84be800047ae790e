"""Where a study is kept: a journal in a folder that one command at a time works in, or a database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from deepenc.arena.record import Record
from deepenc.errors import ConfigError, DeepencError, StoreError
from deepenc.files import only_one
from deepenc.seeds import Roots, derive, number, random_root
from deepenc.study.search import RISING, Search
from deepenc.study.space import distribution, identity

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

JOURNAL = "study.journal"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time in a folder; the lock ends with the process, however it ends.

    Raises:
        StoreError: Another command has it, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_one(folder / JOURNAL))
        except BlockingIOError as error:
            raise StoreError(
                f"{folder} is being tuned by another command; wait for it, or give it --workers"
            ) from error
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
        yield


@contextmanager
def storing(where: str) -> Iterator[None]:
    """What Optuna or a database raises inside becomes a `StoreError`.

    Args:
        where: The study is kept.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except DeepencError:
        raise
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError),
        *(TypeError, ValueError, OptunaError, SQLAlchemyError),
    ) as error:
        cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
        said = str(getattr(cause, "orig", None) or cause).strip().partition("\n")[0]
        raise StoreError(
            f"cannot use the study in {where}: {type(cause).__name__}: {said}; bring back a copy, or choose "
            "another --out or --database"
        ) from error


def place_of(folder: Path, database: str | None) -> str:
    """Where a study is kept, to be shown: without a password."""
    if database is None:
        return str(folder / JOURNAL)
    head, at, tail = database.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if at else database


def open_study(search: Search, folder: Path, database: str | None = None) -> Study:
    """Make a study, or go on with the one that is stored.

    Args:
        search: What to search.
        folder: Of the journal; locked.
        database: URL of a database instead.

    Raises:
        ConfigError: What is stored was made for another search.
        StoreError: It cannot be read.
    """
    import optuna

    where = place_of(folder, database)
    with storing(where):
        study = optuna.create_study(
            storage=_journal(folder) if database is None else database,
            study_name=search.name,
            directions=["maximize" if o in RISING else "minimize" for o in search.objectives],
            load_if_exists=True,
            pruner=_pruner(search),
        )
        wanted, stored = search.identity(), study.user_attrs.get("search")
        if stored is None:
            _begin(search, study)
        elif stored != wanted:
            raise ConfigError(_differing(search, stored, where))
        _check(search, study)
        # After what is stored, so that a resumed search does not draw its first trials again.
        roots = Roots.fromhex(study.user_attrs["root"])
        seed = number(derive(roots.attackers, "sampler", len(study.get_trials(deepcopy=False))))
        from deepenc.study.sampling import sampler

    study.sampler = sampler(search, seed % 2**32, parallel=True)  # no more bits than Optuna takes
    return study


def _journal(folder: Path) -> BaseStorage:
    from optuna.exceptions import OptunaError
    from optuna.storages import JournalStorage

    from deepenc.study.journal import Journal

    journal = Journal(folder / JOURNAL)
    try:
        return JournalStorage(journal)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
        raise journal.damaged(error) from error
    except (OptunaError, ValueError) as error:
        raise journal.damaged(error) from error


def _begin(search: Search, study: Study) -> None:
    """Store what a study is about; last what says that this is done, as the command may be killed before."""
    own = random_root() if search.seed is None else Roots.of_seed(search.seed).below("tune").hex()
    if "root" not in study.user_attrs:
        study.set_user_attr("root", own)
    if (start := search.start()) is not None and not study.get_trials(deepcopy=False):
        study.enqueue_trial(start)
    study.set_user_attr("search", search.identity())


def _differing(search: Search, stored: Any, where: str) -> str:
    wanted = search.identity()
    theirs = stored if isinstance(stored, dict) else {}
    changed = sorted(f for f in wanted.keys() | theirs.keys() if wanted.get(f) != theirs.get(f))
    return (
        f"{where} holds a study {search.name!r} whose {', '.join(changed)} differ: its trials cannot be "
        "compared with new ones; give another name or --out, or restore what was changed"
    )


def _check(search: Search, study: Study) -> None:
    """Hold what is stored to its form, so that nothing breaks when it is used.

    Raises:
        ValueError: Something has another.
    """
    from optuna.trial import TrialState

    records = TypeAdapter(list[Record])
    records.validate_python(study.user_attrs.get("references", []))
    distributions = {axis.field: distribution(axis) for axis in search.space}
    for trial in study.get_trials(deepcopy=False):
        own = trial.user_attrs
        if any(distributions.get(field) != found for field, found in trial.distributions.items()):
            raise ValueError(f"trial {trial.number} has values of another space")
        if not all(isinstance(value, int | float) for value in trial.intermediate_values.values()):
            raise ValueError(f"trial {trial.number} has steps that are no numbers")
        records.validate_python(own.get("records", []))
        if not isinstance(own.get("owner", ""), str) or not isinstance(own.get("reason", ""), str):
            raise ValueError(f"trial {trial.number} has a note that is no text")
        if trial.state == TrialState.COMPLETE and not _whole(search, trial):
            raise ValueError(f"trial {trial.number} is complete, but lacks values")


def _whole(search: Search, trial: FrozenTrial) -> bool:
    identity(search, trial.params)
    values, responses = trial.values or (), trial.user_attrs["responses"]
    return (
        len(values) == len(search.objectives)
        and all(isfinite(value) for value in (*values, *responses))
        and len(trial.params) == len(search.space)
        and "records" in trial.user_attrs
    )


def _pruner(search: Search) -> Any:
    from optuna.pruners import MedianPruner, NopPruner

    single = search.pruning and len(search.objectives) == 1
    return MedianPruner(n_startup_trials=5) if single else NopPruner()
