"""What Lightning's Trainer runs for `training.fit`; imported only when something is trained."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from torch.utils.data import Sampler

from deepenc.tasks.examples import Examples
from deepenc.victims.augment import cropped, flipped, shifted
from deepenc.victims.recipe import TrainingPlan


def train(network: nn.Module, examples: Examples, generator: torch.Generator, plan: TrainingPlan) -> bool:
    """Train a network in place on the device of the examples.

    Args:
        network: In the mode to be trained in; on the CPU afterwards, if that is not its device.
        examples: At least one.
        generator: On the CPU; decides the order of the examples and how images are changed.
        plan: How.

    Returns:
        Whether all stayed finite; if not, the network has the last weights with a finite loss.
    """
    device = examples.device
    learner = Learner(network, generator, plan)
    order = Batches(len(examples), plan.recipe.batch_size, plan.steps, generator)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with _quiet():
            Trainer(
                max_epochs=1,
                accelerator="gpu" if device.type == "cuda" else device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                precision="bf16-mixed" if plan.recipe.mixed else "32-true",
                plugins=[
                    LightningEnvironment()
                ],  # a cluster's variables in the environment are not meant for us
                barebones=True,
            ).fit(learner, examples.loader(order))
    except SystemExit as ended:  # what Lightning makes of Ctrl-C, to ignore the next one
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from ended
    return not learner.diverged


class Batches(Sampler[list[int]]):
    """Indices of all batches of a training: in each pass over the images a new order, without a remainder.

    All passes are one epoch of Lightning's, which takes milliseconds for each: few images make many passes.

    Args:
        count: Examples, ``>= 1``.
        size: Of a batch; where there are fewer examples, they are the only one of a pass.
        steps: Batches in all.
        generator: On the CPU.
    """

    def __init__(self, count: int, size: int, steps: int, generator: torch.Generator) -> None:
        self.count, self.size, self.steps, self.generator = count, size, steps, generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        each = max(1, self.count // self.size)
        for step in range(self.steps):
            batch = step % each
            if not batch:
                order = torch.randperm(self.count, generator=self.generator).tolist()
            yield order[batch * self.size : (batch + 1) * self.size]


class Learner(LightningModule):
    """Trains a network for its task; where that diverges, the last weights with a finite loss come back.

    Args:
        network: Called itself, so that hooks on it see every sample.
        generator: On the CPU; decides how images are changed.
        plan: How.
    """

    def __init__(self, network: nn.Module, generator: torch.Generator, plan: TrainingPlan) -> None:
        super().__init__()
        self.network = network
        self.generator = generator
        self.plan = plan
        self.diverged = False
        self._kept: list[Tensor] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimiser with a cosine, one group for each factor of the learning rate."""
        plan, recipe = self.plan, self.plan.recipe
        factors = sorted(set(plan.factors.values()), reverse=True)
        groups = [{"params": [p for p, own in plan.factors.items() if own == f], "lr": f} for f in factors]
        decay = recipe.weight_decay
        optimizer: Optimizer
        if recipe.optimizer == "adamw":
            optimizer = AdamW(groups, lr=1.0, betas=(recipe.momentum, 0.999), weight_decay=decay)
        else:
            optimizer = SGD(groups, lr=1.0, momentum=recipe.momentum, weight_decay=decay)
        schedule = LambdaLR(optimizer, lambda step: recipe.rate(step, plan.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Any, Any]:
        """Crop, mirror and move images at random, as the recipe says and the task allows."""
        (inputs, targets), recipe = batch, self.plan.recipe
        if not self.plan.task.augments or not isinstance(inputs, Tensor):
            return inputs, targets
        inputs = cropped(inputs, recipe.crop)
        if recipe.flip:
            inputs = flipped(inputs, self.generator)
        return shifted(inputs, recipe.shift, self.generator), targets

    def on_train_start(self) -> None:
        """Remember the weights that training starts from."""
        self._kept = [tensor.clone() for tensor in self._tensors()]

    def training_step(self, batch: tuple[Any, Any], _: int) -> Tensor | None:
        """Loss of one batch; None ends the training."""
        loss = self._loss(*batch)
        for parameter, weight in self.plan.penalties.items():
            loss = loss + weight * parameter.abs().sum()
        if not torch.isfinite(loss):
            self.diverged = self.trainer.should_stop = True
            return None
        torch._foreach_copy_(self._kept, self._tensors())
        return loss

    def on_train_end(self) -> None:
        """Go back where the loss, or what the last step left, is not finite."""
        self.diverged |= not all(bool(tensor.isfinite().all()) for tensor in self._tensors())
        if self.diverged:
            torch._foreach_copy_(self._tensors(), self._kept)

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        recipe, last = self.plan.recipe, self.plan.channels_last
        if last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with _Reshaping() if last else nullcontext():
            return self.plan.task.loss(
                self.network,
                inputs,
                targets,
                smoothing=recipe.label_smoothing,
                temperature=recipe.temperature,
            )

    def _tensors(self) -> list[Tensor]:
        found = (*self.network.parameters(), *self.network.buffers())
        return [t.detach() for t in found if t.is_floating_point()]


class _Reshaping(TorchFunctionMode):
    """Copies where a network's `Tensor.view` does not fit maps whose channels come last in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.view:
            try:
                return func(*args, **kwargs)
            except RuntimeError:
                return Tensor.reshape(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advice on loaders and devices out of the user's log."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
