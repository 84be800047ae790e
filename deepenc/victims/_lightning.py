"""The Lightning module behind `training.fit`; imported only when something is trained."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from deepenc.victims.training import Recipe


class Classifier(LightningModule):
    """Trains a network on labels and remembers its last finite state.

    Args:
        network: Called itself, so that hooks on it see every sample.
        recipe: Learning rates and the like.
        steps: Optimiser steps, over which the learning rate falls.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.steps = steps
        self.diverged = False
        self._kept: list[Tensor] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a cosine."""
        recipe = self.recipe
        optimizer = SGD(
            self.network.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        schedule = CosineAnnealingLR(optimizer, T_max=self.steps, eta_min=recipe.final_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Remember the weights that training starts from."""
        self._kept = [tensor.clone() for tensor in self._tensors()]

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor | None:
        """Cross-entropy of one batch; None ends the training."""
        inputs, labels = batch
        loss = F.cross_entropy(self.network(inputs), labels)
        if not torch.isfinite(loss):
            self._stop()
            return None
        torch._foreach_copy_(self._kept, self._tensors())
        return loss

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
