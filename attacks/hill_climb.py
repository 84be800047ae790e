"""Guess the key, change a guess by one channel, keep what is better."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from deepenc.analysis.consistency import Evidence, decode
from deepenc.arena.case import Attack, Case, Claim
from deepenc.arena.threat import Needs
from deepenc.network.calling import call_with
from deepenc.network.gates import gated_tensors
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors

Key = dict[str, Tensor]
"""Site name to which channels are kept, ``(width,)``, bool."""


class HillClimb(Attack):
    """Search the key: swap a kept channel and a removed one of a site, keep the swap where the loss falls.

    The loss judges whole keys. The verifier judges one site's key by the statistics of the layers behind, in
    the network's order, and where a site's key has few candidates it tries them all. Every guess that is
    judged is a trial.
    """

    name: ClassVar[str] = "hill-climb"

    objective: Literal["loss", "verifier"] = "verifier"
    """The task's loss on labelled images, or consistency of BatchNorm on unlabelled ones."""
    start: Attack | None = Field(None)
    """An attack whose scores are the first guess; default: at random."""
    trials: int | None = Field(None, ge=1)
    """Guesses at most; default: all that the threat model allows. For the verifier the sites share them."""
    images: int = Field(64, ge=2)
    """Images to judge on."""
    enumerate_below: int = Field(5000, ge=0)
    """The verifier tries all keys of a site that has at most as many."""

    @property
    def needs(self) -> Needs:
        """One guess, how many channels to find, the images, and what the start needs."""
        images = "labelled" if self.objective == "loss" else "unlabelled"
        own = Needs(allocation=True, trials=1, **{images: self.images})
        return own if self.start is None else own.union(self.start.needs)

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        rng = np.random.default_rng(case.seed)
        key = self._first(case, rng)
        left = case.meter.left("trials") or 0
        trials = left if self.trials is None else min(self.trials, left)
        climb = self._by_loss if self.objective == "loss" else self._by_verifier
        climb(case, key, trials, rng)
        return Claim(scores={name: (~kept).double().cpu() for name, kept in key.items()})

    def _first(self, case: Case, rng: np.random.Generator) -> Key:
        counts = case.counts()
        scores = None if self.start is None else self.start.attack(case).scores
        key = {}
        for site in case.sites:
            guess = torch.from_numpy(rng.permutation(site.width)).double()
            if scores is not None and site.name in scores:
                guess = scores[site.name].double().cpu()
            kept = torch.ones(site.width, dtype=torch.bool)
            order = guess.argsort(descending=True, stable=True)
            kept[order[: min(counts.get(site.name, 0), site.width - 1)]] = False
            key[site.name] = kept
        return key

    def _by_loss(self, case: Case, key: Key, trials: int, rng: np.random.Generator) -> None:
        inputs, targets = case.labelled[: self.images].batch()
        network = case.copy()
        tensors = named_tensors(network)

        def lose(changed: nn.Module, inputs: Any) -> Tensor:
            return case.task.loss(changed, inputs, targets)

        def judge() -> float:
            case.meter.charge(trials=1)
            gates = {name: kept.to(case.device) for name, kept in key.items()}
            with torch.no_grad():
                changed = gated_tensors(tensors, case.sites, gates)
                loss = float(call_with(network, changed, inputs, lose))
            return loss if math.isfinite(loss) else math.inf

        names = [name for name, kept in key.items() if not kept.all()]
        if not names or not trials:
            return
        best = judge()
        for _ in range(trials - 1):
            kept = key[names[rng.integers(len(names))]]
            pair = swap(kept, rng)
            value = judge()
            if value < best:
                best = value
            else:
                kept[pair] = ~kept[pair]

    def _by_verifier(self, case: Case, key: Key, trials: int, rng: np.random.Generator) -> None:
        waiting = [name for name, kept in key.items() if not kept.all()]
        spent = 0

        def solve(site: Site, evidence: Evidence) -> list[int]:
            nonlocal spent
            if site.name in waiting:
                share = (trials - spent) // len(waiting)
                waiting.remove(site.name)
                kept = key[site.name]
                every = math.comb(len(kept), int((~kept).sum()))
                whole = every <= min(self.enumerate_below, share)
                used = every if whole else share
                case.meter.charge(trials=used)
                spent += used
                best = evidence.best(int((~kept).sum())) if whole else climbed(evidence, kept, share, rng)
                key[site.name] = best.cpu()
            return (~key[site.name]).nonzero().flatten().tolist()

        decode(case.copy(), case.sites, case.unlabelled[: self.images].inputs, solve)


def climbed(evidence: Evidence, kept: Tensor, guesses: int, rng: np.random.Generator) -> Tensor:
    """A site's key after as many guesses, each by a random swap from the best so far; ``(width,)``."""
    best, lowest = kept, math.inf
    for _ in range(guesses):
        value = evidence.loss(kept.to(evidence.own.device))
        if value < lowest:
            best, lowest = kept, value
        kept = best.clone()
        swap(kept, rng)
    return best


def swap(kept: Tensor, rng: np.random.Generator) -> Tensor:
    """Swap a random kept channel and a random removed one, in place; the two, so as to swap them back."""
    removed, real = (part.nonzero().flatten() for part in (~kept, kept))
    pair = torch.stack([removed[rng.integers(len(removed))], real[rng.integers(len(real))]])
    kept[pair] = ~kept[pair]
    return pair
