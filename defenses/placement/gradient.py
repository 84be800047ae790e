"""Placement: a differentiable relaxation of Equation 1."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from deepenc import trees
from deepenc.analysis.batchnorm import batch_statistics
from deepenc.encryption.cost.budget import Ledger, caps, grow
from deepenc.encryption.defense import Allocation, Original
from deepenc.encryption.filling.damage import damage, responses
from deepenc.encryption.filling.inputs import batches, draw
from deepenc.encryption.response.candidates import filled
from deepenc.encryption.response.searched import SearchedPlacement
from deepenc.network.calling import call_with
from deepenc.network.gates import gated_tensors
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import replace_widened

HALVINGS = 40
"""Of the interval in which the shift is sought that keeps strengths within the budget."""
WIDEST_SHIFT = 30.0


class Gradient(SearchedPlacement):
    """Confusion channels everywhere, with a trained strength for each site; the strongest get the budget.

    Every site gets as many candidates as it might have, and a strength in [0, 1] by which all that they pass
    on is multiplied. Mirror ascent raises the response change (its logarithm): the logit of a strength
    grows with its slope for its price, and after each step all are shifted alike, so that together they cost
    the budget. The strength's share of the candidates, rounded down, is the site's count; what is left of
    the budget goes where most was cut off for its price. Source: paper, Equation 1, which it states but does
    not optimise; the relaxation is ours.
    """

    name: ClassVar[str] = "gradient"

    images: int = Field(256, ge=2)
    """The defender's images to use, at most."""
    batch_size: int = Field(64, ge=2)
    """Images per step."""
    steps: int = Field(40, ge=1)
    """Steps of mirror ascent."""
    lr: float = Field(0.5, gt=0)
    """By how much a step raises the logit of the site that is worth most for its price."""
    momentum: float = Field(0.8, ge=0, lt=1)
    """Share of the last slopes that is kept in the next."""
    batch: bool = False
    """Whether BatchNorm normalises by the batch, as for an attacker who re-estimates its statistics."""
    widest: float = Field(0.25, gt=0, le=16)
    """Candidate channels per real channel of a site, at most, while other sites have room."""

    def place(self, original: Original, rng: np.random.Generator) -> Allocation:
        """Train strengths, and round them.

        Raises:
            ConfigError: There are no images, or the budget is below one channel.
        """
        ledger = self.ledger(original)
        most = {name: count for name, count in caps(ledger, self.widest).items() if count}
        inputs = draw(f"placement {self.name!r}", original.model, original, rng, self.images)
        trained = self._trained(original, ledger, most, inputs, rng)
        due = {name: strength * most[name] for name, strength in trained.items()}
        counts = {name: int(share) for name, share in due.items()}
        while ledger.cost(counts) > ledger.limit:  # neighbouring sites cost more together than alone
            name = max((n for n in counts if counts[n]), key=lambda n: counts[n] - due[n])
            counts[name] -= 1

        def cut_off(site: Site, count: int, price: int) -> float:
            left = due.get(site.name, 0.0) - count
            return left / price if left > 0 else left * price  # both fall with the price

        return grow(ledger, counts, cut_off)

    def _trained(
        self,
        original: Original,
        ledger: Ledger,
        most: Mapping[str, int],
        inputs: Any,
        rng: np.random.Generator,
    ) -> dict[str, float]:
        """Site name to its strength."""
        tensors, layout = filled(original, self.weights, rng, most)
        network = replace_widened(original.model, tensors, layout).eval()
        own, sites = named_tensors(network), layout.widened_sites()
        target = responses(original, inputs, self.batch_size)
        logits = {name: torch.zeros((), device=next(iter(own.values())).device) for name in most}
        prices = {name: ledger.price({}, name, count) / ledger.limit for name, count in most.items()}
        _keep(logits, prices)
        order = batches(trees.size(inputs), self.batch_size, rng)
        slopes = {name: torch.zeros_like(logit) for name, logit in logits.items()}
        for _ in range(self.steps):
            index = next(order)
            strengths = {name: logit.sigmoid().requires_grad_() for name, logit in logits.items()}
            with torch.enable_grad(), batch_statistics(network) if self.batch else nullcontext():
                gates = {
                    site.name: pad(strengths[site.name].expand(n), (site.width - n, 0), value=1.0)
                    for site in sites
                    if (n := most.get(site.name))
                }
                changed = gated_tensors(own, sites, gates)
                batch, wanted = (trees.take(tree, index) for tree in (inputs, target))
                got = call_with(network, changed, batch, original.task.response)
                change = damage("response", original.task, got, wanted)
                found = torch.autograd.grad(change, list(strengths.values()), materialize_grads=True)
            for name, slope in zip(logits, found, strict=True):
                worth = torch.nan_to_num(slope, 0, 0, 0) / prices[name]
                slopes[name] = self.momentum * slopes[name] + (1 - self.momentum) * worth
            largest = max(float(slope.abs()) for slope in slopes.values())
            for name, slope in slopes.items():
                logits[name] += self.lr * slope / (largest or 1.0)
            _keep(logits, prices)
        return {name: float(logit.sigmoid()) for name, logit in logits.items()}


def _keep(logits: Mapping[str, Tensor], prices: Mapping[str, float]) -> None:
    """Shift all logits alike, in place, so that the strengths cost the budget, or all candidates if less."""

    def cost(shift: float) -> float:
        return sum(prices[name] * float((logit + shift).sigmoid()) for name, logit in logits.items())

    with torch.no_grad():
        low, high = -WIDEST_SHIFT, WIDEST_SHIFT
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(middle) > 1 else (middle, high)
        for logit in logits.values():
            logit += low
