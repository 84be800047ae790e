"""A small BERT over characters on THUCNews titles, trained on first use."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from deepenc.errors import VictimError
from deepenc.network.factory import Factory
from deepenc.tasks.examples import Examples
from deepenc.tasks.text_classification import TextClassification
from deepenc.victims.data.cache import trained
from deepenc.victims.data.datasets import data_folder
from deepenc.victims.data.images import expect_file
from deepenc.victims.data.splits import checksum, fingerprint, split
from deepenc.victims.data.texts import Text, encoded, read_texts, vocabulary
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource

LENGTH = 32
"""Tokens of a title; the longest has 33 characters, one in a hundred more than 27."""
CLASSES = 10
ATTACKER_SHARE = 0.4
VOCABULARY = 3072
"""Tokens: three special ones, and the most frequent characters of the titles trained on."""
STRUCTURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 1,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.2,
}
RECIPE = Recipe(optimizer="adamw", epochs=6, lr=2e-3, final_lr=0.0, weight_decay=0.1, batch_size=64)
SEED = 0


class Thucnews(VictimSource):
    """A BERT of two layers over characters on THUCNews titles, the paper's Table 4; needs the extra `text`.

    It is trained on ``dev.txt``, 1,000 titles of each of 10 classes, in minutes, on first use: these titles
    are the defender's. Those of ``test.txt`` are the attacker's (4 in 10) and the judge's. Who gets which is
    fixed by their content, whatever the seeds of a run.
    """

    name: ClassVar[str] = "thucnews"

    folder: Path | None = Field(None)
    """Folder with ``dev.txt``, ``test.txt`` (each line a title, a tab and a class number) and ``class.txt``,
    in it or in a folder ``thucnews`` or ``THUCNews/data``; default: the environment variable
    ``DEEPENC_DATA``."""

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        own, names = self._texts("dev"), self._names()
        examples = encoded(own, vocabulary(own, VOCABULARY), LENGTH)
        return self._trained(cache, examples, names), examples[:1].inputs

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        return Factory(
            library="transformers", name="BertForSequenceClassification", arguments=dict(STRUCTURE)
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        own, names = self._texts("dev"), self._names()
        seen = {text.content for text in own}
        test = [text for text in self._texts("test") if text.content not in seen]
        size = int(ATTACKER_SHARE * len(test))
        if not own or not size:
            raise VictimError(
                f"expected titles in {self._root()}, got {len(own)} to train and {len(test)} others to test"
            )
        ids = vocabulary(own, VOCABULARY)
        sides = split([text.content for text in test], (size, len(test) - size))
        texts = [own, *([test[i] for i in side] for side in sides)]
        parts = [encoded(part, ids, LENGTH) for part in texts]
        defender, attacker, judge = parts
        model = self._trained(cache, defender, names)
        task = TextClassification(classes=CLASSES, class_names=names)
        return Victim(self.label, model, task, defender, attacker, judge, fingerprint(model, *parts))

    def _trained(self, cache: Path, titles: Examples, names: tuple[str, ...]) -> nn.Module:
        # Other titles, as another recipe, are another file.
        given = checksum({**titles.inputs, "targets": titles.targets})
        what = repr((asdict(RECIPE), STRUCTURE, SEED, given))
        path = cache / f"thucnews-{hashlib.sha256(what.encode()).hexdigest()[:12]}.safetensors"

        def train(network: nn.Module) -> None:
            task = TextClassification(classes=CLASSES, class_names=names)
            fit(network, task, titles, RECIPE, torch.Generator().manual_seed(SEED))

        return trained(path, self.structure().build(), train)

    def _names(self) -> tuple[str, ...]:
        path = self._root() / "class.txt"
        expect_file(path, "a file with the name of a class in each line")
        names = tuple(path.read_text(encoding="utf-8").split())
        if len(names) != CLASSES:
            raise VictimError(f"{path}: expected {CLASSES} names of classes, got {len(names)}; get it again")
        return names

    def _texts(self, part: str) -> list[Text]:
        return read_texts(self._root() / f"{part}.txt", CLASSES)

    def _root(self) -> Path:
        folder = data_folder(self.folder, f"victim {self.name!r}")
        inner = (folder / name for name in ("thucnews", "THUCNews/data"))
        return next((path for path in inner if path.is_dir()), folder)
