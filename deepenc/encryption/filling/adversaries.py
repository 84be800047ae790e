"""Adversaries to optimise against: what they make of the channels of an encrypted network, as gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam

from deepenc import trees
from deepenc.encryption.filling.damage import Objective, damage
from deepenc.encryption.filling.entries import Confusion
from deepenc.tasks.task import Task

ROUND, GATE_RATE = 10, 0.1
"""Steps after which the gates start again, and Adam's learning rate for them."""
Gates = Mapping[str, Tensor]
"""Site name to a factor for each of its channels, confusion channels included, ``(width,)``."""


def learned_gates(
    confusion: Confusion, task: Task, inputs: Any, target: Any, order: Iterator[Tensor]
) -> Iterator[Gates]:
    """Gates of an attacker who takes one step each time, and starts again after each round.

    Args:
        confusion: The encrypted network.
        task: What the network is for.
        inputs: A batch.
        target: The victim's responses to it.
        order: Indices of batches, without end.
    """
    device = next(iter(confusion.values.values())).device
    objective: Objective = "cross-entropy" if "logits" in task.offers else "response"
    while True:
        gates = {s.name: torch.ones(s.width, device=device, requires_grad=True) for s in confusion.sites}
        adam = Adam(gates.values(), lr=GATE_RATE)
        for _ in range(ROUND):
            index = next(order)
            with torch.enable_grad():
                found = confusion(trees.take(inputs, index), gates=gates)
                loss = damage(objective, task, found, trees.take(target, index))
                gradients = torch.autograd.grad(loss, list(gates.values()), materialize_grads=True)
            for gate, gradient in zip(gates.values(), gradients, strict=True):
                gate.grad = gradient
            adam.step()
            yield {name: gate.detach() for name, gate in gates.items()}


def missing(confusion: Confusion, share: float, rng: np.random.Generator) -> Iterator[Gates]:
    """Gates that silence a share of each site's confusion channels, and as many real ones, at random.

    Args:
        confusion: The encrypted network.
        share: In [0, 1).
        rng: Chooses other ones each time.
    """
    device = next(iter(confusion.values.values())).device
    while True:
        gates = {}
        for site in confusion.sites:
            inserted = list(confusion.layout.positions[site.name])
            chance = np.full(site.width, share * len(inserted) / max(1, site.width - len(inserted)))
            chance[inserted] = share
            kept = torch.from_numpy(rng.random(site.width) >= chance)
            gates[site.name] = kept.float().to(device)
        yield gates
