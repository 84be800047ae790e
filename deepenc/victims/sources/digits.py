"""The embedded victim: scikit-learn's digits and a small residual network, trained on first use."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deepenc.network.factory import Factory
from deepenc.tasks.classification import Classification
from deepenc.tasks.examples import Examples
from deepenc.victims.data.cache import trained
from deepenc.victims.data.splits import digests, fingerprint, split
from deepenc.victims.models import CifarResNet
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit
from deepenc.victims.victim import Victim, VictimSource

SIZES = (697, 500, 600)
RECIPE = Recipe(epochs=20, lr=0.1, batch_size=64, shift=0.125, weight_decay=5e-4)
DEPTH = 14
SEED = 0


class DigitsResNet(VictimSource):
    """A 14-layer residual network on scikit-learn's 1,797 digits; trained on first use, no download."""

    name: ClassVar[str] = "digits-resnet"

    def network(self, cache: Path) -> tuple[nn.Module, Tensor]:
        """See `VictimSource.network`."""
        parts = digit_parts()
        return _trained(cache, parts[0]), parts[0].inputs[:1]

    def structure(self) -> Factory:
        """See `VictimSource.structure`."""
        return Factory(
            library="python",
            name="deepenc.victims.models:CifarResNet",
            arguments={"depth": DEPTH, "channels": 1},
        )

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        defender, attacker, judge = parts = digit_parts()
        model = _trained(cache, defender)
        return Victim(
            self.label,
            model,
            Classification(classes=10),
            defender,
            attacker,
            judge,
            fingerprint(model, *parts),
        )


def digit_parts() -> tuple[Examples, Examples, Examples]:
    """The digits of the defender (who trains on them), the attacker, and the judge.

    Inputs are ``(images, 1, 8, 8)``, standardised by the mean and deviation of all pixels, about 4.9 and
    6.0 of 16.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(data.images.astype(np.float32))
    images = Examples(((pixels - 4.9) / 6.0)[:, None], torch.from_numpy(data.target.astype(np.int64)))
    defender, attacker, judge = (
        images[torch.from_numpy(part)] for part in split(digests(data.images), SIZES)
    )
    return defender, attacker, judge


def _trained(cache: Path, images: Examples) -> nn.Module:
    # A changed recipe is another file, never old weights under a new recipe.
    recipe = hashlib.sha256(repr((asdict(RECIPE), DEPTH, SEED)).encode()).hexdigest()[:12]
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        model = CifarResNet(DEPTH, channels=1)

    def train(network: nn.Module) -> None:
        fit(network, Classification(), images, RECIPE, generator)

    return trained(cache / f"digits-resnet-{recipe}.safetensors", model, train)
