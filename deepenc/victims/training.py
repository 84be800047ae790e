"""Training with Lightning: one plain recipe, for victims and for attackers alike."""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from deepenc.analysis.batchnorm import batchnorms
from deepenc.errors import ConfigError, near
from deepenc.victims.augment import cropped, flipped, shifted
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
        flip: Whether images are mirrored left to right at random.
        crop: Smallest area, as a fraction of the image's, of random rectangles that are cut out and resized;
            0 leaves images whole.
        label_smoothing: Share of each target that is spread over all classes, in [0, 1].
        eval_norms: Whether BatchNorm layers stay in eval mode: stored statistics are used, and kept.
        mixed: Whether the network runs in bfloat16 where that is safe (Lightning's ``"bf16-mixed"``); twice
            as fast on processors that know the format.
    """

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


def fit(
    network: nn.Module,
    images: Images,
    recipe: Recipe,
    generator: torch.Generator,
    groups: Mapping[str, float] | None = None,
    l1: Mapping[str, float] | None = None,
) -> bool:
    """Train a network in place and leave it in eval mode.

    All randomness (order, augmentation, dropout) comes from the generator; the global generators, the grad
    mode and the parameters' ``requires_grad`` are as before.

    Args:
        network: On the device of the images.
        images: At least one; an incomplete last batch is left out where there is another. Labels may also
            be probabilities, ``(images, classes)``, floating point.
        recipe: How.
        generator: On the CPU.
        groups: Parameter name to the factor of its learning rate; parameters not named, or with 0, stay as
            they are. Default: all are trained alike.
        l1: Parameter name to the weight, in the loss, of the sum of its absolute values.

    Returns:
        Whether all went well. Where the loss or the weights did not stay finite, training stopped and the
        network has the last weights with a finite loss.

    Raises:
        ConfigError: There are no images, or a name is no parameter's.
        OutOfBudget: A metered network, or the metered optimiser, may not spend that much.
    """
    if not len(images):
        raise ConfigError("expected at least one image to train on, got none")
    factors, penalties = _by_parameter(network, groups), _by_parameter(network, l1 or {})
    steps = recipe.total_steps(len(images))
    if steps == 0 or not factors:
        network.eval()
        return True
    wanted = {p: p.requires_grad for p in network.parameters()}
    try:
        with (
            _own_randomness(generator, images.inputs.device),
            torch.enable_grad(),
            _quiet(),
            _channels_last(network, images.inputs) as channels_last,
        ):
            network.train()
            for norm in batchnorms(network).values() if recipe.eval_norms else ():
                norm.eval()
            for parameter in wanted:
                parameter.requires_grad_(parameter in factors)
            course = Course(recipe, steps, factors, penalties, channels_last)
            return _run(network, images, generator, course)
    finally:
        for parameter, grad in wanted.items():
            parameter.requires_grad_(grad)
            parameter.grad = None
        network.to(images.inputs.device).eval()


@dataclass(frozen=True)
class Course:
    """A recipe made out for one network.

    Attributes:
        recipe: The recipe.
        steps: Optimiser steps, ``>= 1``.
        factors: Parameters to train, with the factors of their learning rates.
        penalties: Parameters whose absolute values are penalised, with the penalties' weights.
        channels_last: Whether inputs shall be in that memory format.
    """

    recipe: Recipe
    steps: int
    factors: Mapping[nn.Parameter, float]
    penalties: Mapping[nn.Parameter, float]
    channels_last: bool


def _by_parameter(network: nn.Module, named: Mapping[str, float] | None) -> dict[nn.Parameter, float]:
    """Values by parameter instead of by name, without zeros; by default 1 for each."""
    own = dict(network.named_parameters(remove_duplicate=False))
    if named is None:
        return dict.fromkeys(own.values(), 1.0)
    if strangers := sorted(set(named) - set(own)):
        raise ConfigError(f"the network has no parameters {strangers[:5]}: {near(strangers[0], own)}")
    if negative := sorted(name for name, value in named.items() if not value >= 0):
        raise ConfigError(f"expected factors >= 0, got {named[negative[0]]} for {negative[0]!r}")
    return {own[name]: value for name, value in named.items() if value > 0}


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
                yield self._augmented(self.images.inputs[chosen]), self.images.labels[chosen]

    def _augmented(self, inputs: Tensor) -> Tensor:
        inputs = cropped(inputs, self.recipe.crop)
        if self.recipe.flip:
            inputs = flipped(inputs, self.generator)
        return shifted(inputs, self.recipe.shift, self.generator)


def _run(network: nn.Module, images: Images, generator: torch.Generator, course: Course) -> bool:
    # Imported here: whoever only encrypts does not wait for Lightning.
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer

    from deepenc.victims._lightning import Classifier

    device = images.inputs.device
    classifier = Classifier(network, course)
    trainer = Trainer(
        max_steps=course.steps,
        max_epochs=-1,
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if course.recipe.mixed else "32-true",
        plugins=[LightningEnvironment()],  # a cluster's variables in the environment are not meant for us
        barebones=True,
    )
    with _interruptible():
        trainer.fit(classifier, Batches(images, course.recipe, generator))
    return classifier.finish()


@contextmanager
def _channels_last(network: nn.Module, inputs: Tensor) -> Iterator[bool]:
    """Lay the weights of convolutions out as they are fastest, and back again; says whether it did."""
    if inputs.ndim != 4 or not any(isinstance(m, nn.Conv2d) for m in network.modules()):
        yield False
        return
    plain = [p for p in network.parameters() if p.ndim == 4 and p.is_contiguous()]
    network.to(memory_format=torch.channels_last)
    try:
        yield True
    finally:
        for parameter in plain:
            # Not `contiguous`: with a dimension of size 1 it may keep strides that choose other kernels.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


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
