"""A user's own data: by a function, a folder of images, arrays in a file, or texts in a table."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from deepenc import trees
from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task
from deepenc.victims.data.images import expect_file, image_folder
from deepenc.victims.data.splits import split

Transform = Callable[[Image.Image], Tensor]
Tokenise = Callable[[Sequence[str]], dict[str, Tensor]]
FORMS = (
    "a function `module:name` that returns a data set, a folder with one folder of images a class, a file "
    ".npz or .safetensors with `inputs` and `labels`, or a table .csv with `text` and `label`"
)


def as_examples(data: Any, task: Task, *, workers: int = 0) -> Examples:
    """Examples of whatever a user has in memory.

    Args:
        data: `Examples`, a map-style data set of pairs (input, target), or a pair of tensors
            (inputs, targets).
        task: Makes batches of a data set's items.
        workers: Processes that read a data set ahead.

    Raises:
        VictimError: It is something else, or holds nothing.
    """
    if isinstance(data, tuple) and len(data) == 2 and trees.size(data[0]):
        data = Examples(*data)
    readable = hasattr(data, "__getitem__") and not isinstance(data, Examples | str | Tensor | dict)
    if isinstance(data, Dataset) or readable:
        data = Examples.read(data, task.collate, workers=workers)
    if not isinstance(data, Examples):
        raise VictimError(
            f"expected a data set of pairs (input, target), or a pair of tensors, got {trees.described(data)}"
        )
    if not len(data):
        raise VictimError("the data set is empty; give one with examples")
    return data


def read_examples(
    source: str, task: Task, transform: Transform, tokenise: Tokenise | None, *, workers: int = 0
) -> Examples:
    """Examples from where a configuration says they are.

    Args:
        source: One of the forms listed in `FORMS`.
        task: What they are for.
        transform: Makes an image of a folder an input.
        tokenise: Makes texts of a table inputs; None where no tokenizer is given.
        workers: Processes that read ahead.

    Raises:
        VictimError: It is missing, unreadable, or of another form.
    """
    path = Path(source)
    if path.is_dir():
        return as_examples(image_folder(path, transform), task, workers=workers)
    if path.suffix in (".npz", ".safetensors"):
        return Examples(*_arrays(path))
    if path.suffix == ".csv":
        return Examples(*_texts(path, tokenise))
    module, colon, name = source.partition(":")
    if not colon or not name:
        raise VictimError(f"no data at {source!r}; expected {FORMS}")
    return as_examples(called(module, name), task, workers=workers)


def look_here() -> None:
    """Find modules in the folder of the command, too, as Python does for a script in it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def called(module: str, name: str) -> Any:
    """What a function of the user's returns; the folder of the command counts as a place of modules.

    Raises:
        VictimError: There is none, or it raises.
    """
    look_here()
    try:
        return getattr(importlib.import_module(module), name)()
    except Exception as error:  # a user's own code
        raise VictimError(
            f"the data {module}:{name} cannot be made ({type(error).__name__}: {first_line(error)}); it must "
            "be a function without arguments in a module that can be imported from here"
        ) from error


def _arrays(path: Path) -> tuple[Tensor, Tensor]:
    expect_file(path, "a file of arrays")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                held: Mapping[str, Any] = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            held = load_file(path)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise VictimError(
            f"cannot read the arrays of {path}: {first_line(error)}; write them again"
        ) from error
    if missing := {"inputs", "labels"} - set(held):
        raise VictimError(f"{path} holds {sorted(held)}; expected `inputs` and `labels` ({missing} missing)")
    inputs, labels = held["inputs"], held["labels"]
    if inputs.dtype == torch.float64:
        inputs = inputs.float()
    return inputs, labels if labels.is_floating_point() else labels.long()


def _texts(path: Path, tokenise: Tokenise | None) -> tuple[dict[str, Tensor], Tensor]:
    if tokenise is None:
        raise VictimError(f"{path} holds texts; give `tokenizer`, a folder or name that transformers knows")
    expect_file(path, "a table")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise VictimError(f"cannot read the table {path}: {error}; save it as UTF-8 CSV") from error
    if not rows or not {"text", "label"} <= set(rows[0]):
        raise VictimError(f"{path}: expected a table with the columns `text` and `label`, and rows in it")
    try:
        labels = torch.tensor([int(row["label"]) for row in rows])
    except (TypeError, ValueError) as error:
        raise VictimError(f"{path}: expected whole numbers from 0 as `label`; {error}") from error
    return tokenise([row["text"] or "" for row in rows]), labels


def in_parts(held: Examples, training: Examples | None, shares: Sequence[float]) -> list[Examples]:
    """The defender's, the attacker's and the judge's part.

    Args:
        held: Examples that the network was not trained on.
        training: What it was trained on: the defender's part; None where it is of the rest as well.
        shares: Of the three; without the first where ``training`` is given.

    Raises:
        VictimError: A part would be empty.
    """
    if training is None:
        return share_out(held, shares)
    rest = sum(shares[1:])
    return [training, *share_out(held, [share / rest for share in shares[1:]], training)]


def share_out(examples: Examples, shares: Sequence[float], avoid: Examples | None = None) -> list[Examples]:
    """Parts of some examples by their content, equal ones always in one part.

    Args:
        examples: To share out.
        shares: Of each part, summing up to 1.
        avoid: Examples that no part may hold.

    Raises:
        VictimError: A part would be empty.
    """
    ids = examples.digests()
    if avoid is not None:
        seen = set(avoid.digests())
        fresh = [i for i, digest in enumerate(ids) if digest not in seen]
        examples, ids = examples[fresh], [ids[i] for i in fresh]
    sizes = [int(share * len(ids)) for share in shares]
    parts = [examples[torch.from_numpy(part)] for part in split(ids, sizes)]
    if not all(map(len, parts)):
        raise VictimError(
            f"{len(ids)} examples do not make parts of {sizes}; give more, or other `shares` of the "
            "defender, the attacker and the judge"
        )
    return parts
