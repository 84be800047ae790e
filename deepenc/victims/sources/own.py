"""A user's own network, with his own data, for whatever task."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task
from deepenc.victims.data.datasets import DEVIATION, MEAN
from deepenc.victims.data.images import preparing
from deepenc.victims.data.own import in_parts, look_here, read_examples
from deepenc.victims.data.splits import fingerprint
from deepenc.victims.sources.network import Network
from deepenc.victims.victim import Victim

Shares = tuple[float, float, float]


class Own(Network):
    """Your own network with your own data: a factory, weights, data, and the task.

    The data are shared out by their content: to the defender, the attacker and the judge, so that no example
    is in two parts. The network should not have been trained on them; where ``training`` names what it was
    trained on, the defender's part is of these, and whatever is in both is left out of the others.
    """

    name: ClassVar[str] = "own"

    called: str = Field("")
    """How tables call it; default: the factory."""
    data: str = Field("")
    """A function ``module:name`` that returns a data set of pairs (input, target), a folder with one folder
    of images a class, a file ``.npz`` or ``.safetensors`` with ``inputs`` and ``labels``, or a table ``.csv``
    with ``text`` and ``label``."""
    training: str = Field("")
    """What the network was trained on, in the same forms: the defender's part."""
    task: Task = Field(default_factory=Classification)
    """What the network is for."""
    shares: Shares = Field((0.2, 0.4, 0.4))
    """Shares of the data of the defender, the attacker and the judge; where ``training`` is given, the first
    is not used."""
    size: int = Field(224, ge=8)
    """Side of the images of a folder, in pixels."""
    mean: tuple[float, float, float] = MEAN
    """Of the channels of a folder's images, for values in [0, 1]."""
    deviation: tuple[float, float, float] = DEVIATION
    """Likewise."""
    tokenizer: str = Field("")
    """Folder or name of a tokenizer of transformers, for a table of texts."""
    tokens: int = Field(128, ge=2)
    """Tokens of a text; longer ones are cut, shorter ones padded."""
    scope: str = Field("")
    """Submodule in which sites are looked for; default: the whole network."""
    streams: bool = Field(False)
    """Whether residual streams count as sites."""
    readers: int = Field(0, ge=0)
    """Processes that read data ahead while a network is trained."""

    @model_validator(mode="after")
    def _shares_of_one(self) -> Own:
        if min(self.shares) < 0 or not 0.99 < sum(self.shares) < 1.01:
            raise ValueError(f"shares: expected three shares that sum up to 1, got {list(self.shares)}")
        return self

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.called or str(self.factory)

    def built(self) -> nn.Module:
        """See `Network.built`."""
        look_here()
        return super().built()

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`; without ``example`` it is the first of the data."""
        if self.example is not None or not self.data:
            return super().network(cache)
        victim = self.load(cache)
        return victim.model, victim.example

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        if not self.data:
            raise VictimError(f"victim {self.label!r} needs data; give `data`, such as my_project.data:build")
        model = self.built()
        held = self._read(self.data)
        training = self._read(self.training) if self.training else None
        defender, attacker, judge = in_parts(held, training, self.shares)
        return Victim(
            self.label,
            model,
            self.task,
            defender,
            attacker,
            judge,
            fingerprint(model, defender, attacker, judge),
            scope=self.scope,
            streams=self.streams,
        )

    def _read(self, source: str) -> Examples:
        transform = preparing(self.size, self.mean, self.deviation)
        tokenise = partial(tokenised, self.tokenizer, self.tokens) if self.tokenizer else None
        return read_examples(source, self.task, transform, tokenise, workers=self.readers)


def tokenised(tokenizer: str, tokens: int, texts: list[str]) -> dict[str, Tensor]:
    """Texts as token ids and masks, ``(texts, tokens)`` each.

    Raises:
        VictimError: There is no such tokenizer.
    """
    try:
        from transformers import AutoTokenizer

        made: Any = AutoTokenizer.from_pretrained(tokenizer)
        found = made(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    except Exception as error:  # transformers raises whatever a folder leads it to
        raise VictimError(
            f"the tokenizer {tokenizer!r} cannot be used ({type(error).__name__}: {first_line(error)}); give "
            "a folder of transformers, and install deepenc[text]"
        ) from error
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
