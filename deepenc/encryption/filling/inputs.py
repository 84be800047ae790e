"""The defender's examples, for hardenings that need some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.encryption.defense import Original
from deepenc.errors import ConfigError
from deepenc.network.structure import named_tensors


def draw(blame: str, network: nn.Module, original: Original, rng: np.random.Generator, count: int) -> Any:
    """Inputs of some of the defender's examples as a batch, on the network's device, in random order.

    Args:
        blame: Who needs them, for the message.
        network: Where they will be run.
        original: What the defender has.
        rng: Chooses them.
        count: At most.

    Raises:
        ConfigError: There are fewer than two.
    """
    held = 0 if original.data is None else len(original.data)
    if original.data is None or held < 2:
        raise ConfigError(
            f"{blame} needs the defender's examples, got {held}; give `encrypt` at least two as `data=`"
        )
    index = torch.from_numpy(rng.permutation(held)[:count])
    device = next((tensor.device for tensor in named_tensors(network).values()), original.data.device)
    return trees.move(original.data.batch(index).inputs, device)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Indices of shuffled batches without end; an incomplete last batch is left out where there is another.

    Args:
        count: Images there are, ``>= 1``.
        size: Images a batch, ``>= 1``.
        rng: Shuffles.
    """
    while True:
        order = torch.from_numpy(rng.permutation(count))
        for start in range(0, max(1, count // size) * size, size):
            yield order[start : start + size]
