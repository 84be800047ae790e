"""A small public language model with stories like those it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory, without_origin
from deepenc.tasks.examples import Examples
from deepenc.tasks.next_token import NextToken
from deepenc.victims.data.datasets import data_folder
from deepenc.victims.data.images import expect_file
from deepenc.victims.data.splits import digests, fingerprint, split
from deepenc.victims.victim import Victim, VictimSource
from deepenc.victims.weights import load_into

LENGTH = 128
"""Tokens of a row."""
SHARES = (0.25, 0.35)
"""Of the rows, the defender's and the attacker's; the judge has the rest."""
CLASS = "LlamaForCausalLM"


class Stories(VictimSource):
    """The language model stories260K (a Llama of 0.26 million weights) on TinyStories; needs extra `text`.

    Inputs are rows of 128 tokens, each the beginning of a story. Whether the network was trained on these
    stories is not known; who gets which is fixed by their content, whatever the seeds of a run.
    """

    name: ClassVar[str] = "stories"

    folder: Path | None = Field(None)
    """Folder with the network as transformers saves it (``config.json``, ``model.safetensors``), and either
    ``tokens.npz`` (``tokens``, rows of 128 ids) or the ids as llama2.c writes them (``*.bin``, uint16, each
    story after a 1), in it or in a folder ``stories``; default: the environment variable ``DEEPENC_DATA``."""

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        ids = torch.randint(3, 100, (1, 16), generator=torch.Generator().manual_seed(0))
        return self._network(), {"input_ids": ids}

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        path = self._root() / "config.json"
        expect_file(path, "the configuration of a network of transformers")
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise VictimError(f"cannot read {path} ({error}); get it again") from error
        if not isinstance(plain, dict):
            raise VictimError(f"{path}: expected a JSON object, got {type(plain).__name__}; get it again")
        # What a network keeps to go on with a text would only cost time.
        return Factory(
            library="transformers", name=CLASS, arguments=without_origin(plain) | {"use_cache": False}
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        rows = read_rows(self._root())
        ids = digests(rows)
        sizes = [int(share * len(rows)) for share in SHARES]
        if min(sizes) < 1:
            raise VictimError(f"expected rows of tokens in {self._root()}, got {len(rows)}; add some")
        tokens = torch.from_numpy(rows.astype(np.int64))
        parts = []
        for chosen in split(ids, (*sizes, len(rows) - sum(sizes))):
            own = tokens[torch.from_numpy(chosen)]
            parts.append(Examples({"input_ids": own}, own))
        model = self._network()
        defender, attacker, judge = parts
        return Victim(self.label, model, NextToken(), defender, attacker, judge, fingerprint(model, *parts))

    def _network(self) -> nn.Module:
        network = self.structure().build()
        load_into(network, self._root() / "model.safetensors", CLASS)
        return network

    def _root(self) -> Path:
        folder = data_folder(self.folder, f"victim {self.name!r}")
        inner = folder / "stories"
        return inner if inner.is_dir() else folder


def read_rows(folder: Path) -> NDArray[np.uint16]:
    """Rows of tokens, ``(stories, 128)``: the beginnings of all stories that are long enough, each once.

    Raises:
        VictimError: There are none, or they are unusable.
    """
    packed, files = folder / "tokens.npz", sorted(folder.glob("*.bin"))
    try:
        if packed.is_file():
            with np.load(packed) as held:
                rows = held["tokens"]
        else:
            rows = _beginnings(np.concatenate([np.fromfile(file, dtype="<u2") for file in files]))
    except Exception as error:  # damaged files are told of in many ways
        raise VictimError(
            f"no tokens in {folder} ({type(error).__name__}: {error}); put tokens.npz there, or the *.bin "
            "of llama2.c's tinystories.py pretokenize --vocab_size=512"
        ) from error
    if rows.ndim != 2 or rows.shape[1] != LENGTH or not np.issubdtype(rows.dtype, np.integer):
        raise VictimError(
            f"{packed}: expected whole numbers (rows, {LENGTH}), got {rows.dtype} {rows.shape}; cut the "
            "stories into rows"
        )
    return np.unique(rows.astype(np.uint16), axis=0)


def _beginnings(ids: NDArray[np.uint16]) -> NDArray[np.uint16]:
    starts = np.flatnonzero(ids == 1)
    long = starts[np.diff(np.append(starts, len(ids))) >= LENGTH]
    rows: NDArray[np.uint16] = ids[long[:, None] + np.arange(LENGTH)]
    return rows
