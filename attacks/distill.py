"""Training the encrypted network to answer as the authorised model does."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from deepenc.arena.case import Case, Claim, Weakness
from deepenc.arena.kit.training import TrainedAttack, affordable, train
from deepenc.arena.threat import Needs
from deepenc.errors import ClaimError
from deepenc.tasks.examples import Examples, joined


class Distill(TrainedAttack):
    """Ask the authorised model about every image held, and train the encrypted network on its answers.

    No label is used. From a blank network it is the Knockoff attack (Orekondy et al. 2019), which steals by
    the answers alone: what the encrypted network is worth beyond these is the difference.
    """

    name: ClassVar[str] = "distill"
    detects: ClassVar[Weakness | None] = "damage"

    start: Literal["encrypted", "blank"] = "encrypted"
    """What is trained: the encrypted network, or a freshly initialised one."""
    queries: int = Field(1000, ge=2)
    """Images to ask about, at most, once each: unlabelled ones first, then labelled ones."""
    temperature: float = Field(1.0, gt=0)
    """Divides the outputs of both models before the softmax; gradients shrink with its square."""
    lr: float = Field(0.01, gt=0)
    """First learning rate."""

    @property
    def needs(self) -> Needs:
        """Two images, fewer of which have no batch statistics, and answers about them."""
        return Needs(
            unlabelled=2,
            oracle=2,
            architecture=self.start == "blank",
            offers=frozenset({"answers"}),
        )

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        if case.oracle is None:
            raise ClaimError("distill needs answers of the authorised model: `oracle` of at least 2")
        network = self._start(case)
        left = case.meter.left("queries")
        held = joined([case.unlabelled, case.labelled])
        held = held[: self.queries if left is None else min(self.queries, left)]
        recipe = replace(self.recipe(), temperature=self.temperature)
        # Whoever cannot train keeps the answers for another.
        if len(held) < 2 or affordable(case, recipe, held).steps == 0:
            return Claim(network=network)
        inputs = held.inputs
        answers = case.task.answers(case.oracle(inputs), temperature=self.temperature)
        return train(case, network, recipe, examples=Examples(inputs, answers))

    def _start(self, case: Case) -> nn.Module:
        if self.start == "encrypted":
            return case.copy()
        if case.blank is None:
            raise ClaimError("distill from a blank network needs `architecture: true`")
        return case.blank(case.seed).eval()
