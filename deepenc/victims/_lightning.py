"""The Lightning module behind `training.fit`; imported only when something is trained."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

from deepenc.victims.recipe import Course


class Classifier(LightningModule):
    """Trains a network on labels and remembers its last finite state.

    Args:
        network: Called itself, so that hooks on it see every sample.
        course: How.
    """

    def __init__(self, network: nn.Module, course: Course) -> None:
        super().__init__()
        self.network = network
        self.course = course
        self.diverged = False
        self._kept: list[Tensor] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a cosine, one group for each factor of the learning rate."""
        course, recipe = self.course, self.course.recipe
        factors = sorted(set(course.factors.values()), reverse=True)
        groups = [{"params": [p for p, own in course.factors.items() if own == f], "lr": f} for f in factors]
        optimizer = SGD(groups, lr=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        schedule = LambdaLR(optimizer, lambda step: recipe.rate(step, course.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Remember the weights that training starts from."""
        self._kept = [tensor.clone() for tensor in self._tensors()]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor | None:
        """Cross-entropy of one batch; None ends the training."""
        inputs, labels = batch
        outputs = self._outputs(inputs)
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.course.recipe.label_smoothing)
        for parameter, weight in self.course.penalties.items():
            loss = loss + weight * parameter.abs().sum()
        if not torch.isfinite(loss):
            self._stop()
            return None
        torch._foreach_copy_(self._kept, self._tensors())
        return loss

    def _outputs(self, inputs: Tensor) -> Tensor:
        if not self.course.channels_last:
            return cast(Tensor, self.network(inputs))
        with _Reshaping():
            return cast(Tensor, self.network(inputs.contiguous(memory_format=torch.channels_last)))

    def finish(self) -> bool:
        """Go back to the last finite state where the last step left it; say whether all went well."""
        if not all(bool(torch.isfinite(t).all()) for t in self._tensors()):
            self._stop()
        if self.diverged:
            with torch.no_grad():
                kept = [old.to(new.device) for old, new in zip(self._kept, self._tensors(), strict=True)]
                torch._foreach_copy_(self._tensors(), kept)
        return not self.diverged

    def _stop(self) -> None:
        self.diverged = True
        self.trainer.should_stop = True

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
