"""How a network is trained: one plain recipe, for victims and for attackers alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import nn

from deepenc.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Gradient descent with a cosine from one learning rate to another.

    The defaults are the paper's fine-tuning (Table 5): stochastic gradient descent with momentum.

    Attributes:
        optimizer: SGD, or AdamW (Loshchilov and Hutter 2019), which transformers are trained with; its
            learning rates are about 100 times smaller.
        epochs: Passes over the images; not used where ``steps`` is given.
        steps: Optimiser steps.
        lr: First learning rate.
        final_lr: Last learning rate.
        momentum: Of SGD; of AdamW the first β, the second being 0.999.
        weight_decay: Of SGD, in the gradient; of AdamW, decoupled from it.
        batch_size: Images per step; fewer where there are fewer.
        shift: Images are moved at random by up to this fraction of their size, the border filled with the
            image's own edge; 0 leaves them as they are.
        flip: Whether images are mirrored left to right at random.
        crop: Smallest area, as a fraction of the image's, of random rectangles that are cut out and resized;
            0 leaves images whole.
        label_smoothing: Share of each target that is spread over all classes, in [0, 1].
        temperature: Divides class scores before the softmax.
        eval_norms: Whether BatchNorm layers stay in eval mode: stored statistics are used, and kept.
        mixed: Whether the network runs in bfloat16 where that is safe (Lightning's ``"bf16-mixed"``); twice
            as fast on processors that know the format.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: int = 15
    steps: int | None = None
    lr: float = 0.1
    final_lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 64
    shift: float = 0.0
    flip: bool = False
    crop: float = 0.0
    label_smoothing: float = 0.0
    temperature: float = 1.0
    eval_norms: bool = False
    mixed: bool = False

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, the first being 0, of ``steps`` in all."""
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * step / steps)) / 2

    def total_steps(self, images: int) -> int:
        """Optimiser steps of the recipe on that many images."""
        if self.steps is not None:
            return self.steps
        return self.epochs * max(1, images // self.batch_size)

    def within(self, images: int, *, steps: int | None, samples: int | None) -> Self:
        """The recipe cut to what may be spent, its cosine with it.

        Args:
            images: Images to train on.
            steps: Optimiser steps left, None without limit.
            samples: Samples left, None without limit.
        """
        allowed = [self.total_steps(images)]
        if steps is not None:
            allowed.append(steps)
        if samples is not None:
            allowed.append(samples // max(1, min(images, self.batch_size)))
        return replace(self, steps=max(0, min(allowed)))


@dataclass(frozen=True)
class TrainingPlan:
    """A recipe resolved for one network.

    Attributes:
        task: What is trained for.
        recipe: The recipe.
        steps: Optimiser steps, ``>= 1``.
        factors: Parameters to train, with the factors of their learning rates.
        penalties: Parameters whose absolute values are penalised, with the penalties' weights.
        channels_last: Whether inputs shall be in that memory format.
    """

    task: Task
    recipe: Recipe
    steps: int
    factors: Mapping[nn.Parameter, float]
    penalties: Mapping[nn.Parameter, float]
    channels_last: bool
