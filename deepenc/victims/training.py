"""Training with Lightning: one plain recipe, for victims and for attackers alike."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from deepenc.errors import ConfigError
from deepenc.victims.victim import Images


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stochastic gradient descent with momentum and a cosine from one learning rate to another.

    The defaults are the paper's fine-tuning (Table 5).

    Attributes:
        epochs: Passes over the images; not used where ``steps`` is given.
        steps: Optimiser steps.
        lr: First learning rate.
        final_lr: Last learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Images per step; fewer where there are fewer.
        shift: Images are moved at random by up to this fraction of their size, the border filled with the
            image's own edge; 0 leaves them as they are.
    """

    epochs: int = 15
    steps: int | None = None
    lr: float = 0.1
    final_lr: float = 1e-4
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 64
    shift: float = 0.0

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


def fit(network: nn.Module, images: Images, recipe: Recipe, generator: torch.Generator) -> bool:
    """Train a network in place and leave it in eval mode.

    All randomness (order, shifts, dropout) comes from the generator; the global generators, the grad mode
    and the parameters' ``requires_grad`` are as before. All parameters are trained, on the images' device.

    Args:
        network: On the device of the images.
        images: At least one; an incomplete last batch is left out where there is another.
        recipe: How.
        generator: On the CPU.

    Returns:
        Whether all went well. Where the loss or the weights did not stay finite, training stopped and the
        network has the last weights with a finite loss.

    Raises:
        ConfigError: There are no images.
        OutOfBudget: A metered network, or the metered optimiser, may not spend that much.
    """
    if not len(images):
        raise ConfigError("expected at least one image to train on, got none")
    steps = recipe.total_steps(len(images))
    if steps == 0:
        network.eval()
        return True
    wanted = {p: p.requires_grad for p in network.parameters()}
    try:
        with _own_randomness(generator, images.inputs.device), torch.enable_grad(), _quiet():
            network.train().requires_grad_(True)
            return _run(network, images, recipe, steps, generator)
    finally:
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)
            parameter.grad = None
        network.to(images.inputs.device).eval()


class Batches:
    """Shuffled batches without end, drawn from a generator of their own."""

    def __init__(self, images: Images, recipe: Recipe, generator: torch.Generator) -> None:
        self.images, self.recipe, self.generator = images, recipe, generator

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of ``(inputs, labels)``, epoch after epoch."""
        count, size = len(self.images), self.recipe.batch_size
        while True:
            order = torch.randperm(count, generator=self.generator)
            for start in range(0, max(1, count // size) * size, size):
                chosen = order[start : start + size].to(self.images.inputs.device)
                inputs = self.images.inputs[chosen]
                yield shifted(inputs, self.recipe.shift, self.generator), self.images.labels[chosen]


def shifted(inputs: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Move each image by its own random offset, up to a fraction of its size.

    Args:
        inputs: ``(images, channels, height, width)``; other shapes are left as they are.
        fraction: In [0, 1).
        generator: On the CPU.
    """
    if inputs.ndim != 4 or fraction == 0:
        return inputs
    count, _, height, width = inputs.shape

    def moved(size: int) -> Tensor:
        reach = round(fraction * size)
        offsets = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
        return (torch.arange(size) + offsets).clamp(0, size - 1).to(inputs.device)

    rows, columns = moved(height), moved(width)
    image = torch.arange(count, device=inputs.device)
    # Advanced indices around the channel slice bring the channels to the end.
    return inputs[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _run(network: nn.Module, images: Images, recipe: Recipe, steps: int, generator: torch.Generator) -> bool:
    # Imported here: whoever only encrypts does not wait for Lightning.
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer

    from deepenc.victims._lightning import Classifier

    device = images.inputs.device
    classifier = Classifier(network, recipe, steps)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],  # a cluster's variables in the environment are not meant for us
        barebones=True,
    )
    with _interruptible():
        trainer.fit(classifier, Batches(images, recipe, generator))
    return classifier.finish()


@contextmanager
def _own_randomness(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Global generators seeded from ours, for dropout, and put back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice out of the user's log: loaders, progress bars and checkpoints are not meant."""
    import lightning.pytorch  # noqa: F401  # its import sets the levels that are changed here

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning")
        loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be Ctrl-C: Lightning turns it into an exit, and then ignores the next one."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
