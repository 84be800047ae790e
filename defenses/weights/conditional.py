"""Weights: drawn given where they are, from the layer's own neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from deepenc.encryption.defense import Gap, Neurons, Weights
from deepenc.encryption.filling.fills import (
    DEFAULTS,
    NormFill,
    assemble,
    bootstrapped,
    distinct,
    finished,
    placed,
    real_rows,
)
from deepenc.network.sites import Role


class Conditional(Weights):
    """Each kernel drawn from those that real neurons have with the same channel.

    Incoming kernels come from the same input's, outgoing ones from the same output's, so that the profile
    over inputs and outputs and the smoothness of kernels stay. As ``gaussian`` neurons are drawn whole
    instead, from a normal distribution with the mean and, up to a low rank, the covariance of the layer's
    real ones over all they have: incoming and outgoing weights, biases and norms.

    What still tells: bootstrapped rows are a little less like any other row than real ones are, and more
    peaked; Gaussian ones lie too well in the space of the real rows, the more so the larger ``share``.
    Patterns of zeros are lost in a normal distribution.
    """

    name: ClassVar[str] = "conditional"

    form: Literal["bootstrap", "gaussian"] = "bootstrap"
    """Draw kernels one by one, or whole neurons from a normal distribution."""
    jitter: float = Field(0.1, ge=0, le=0.5)
    """Relative deviation of each entry from the one drawn; with 0 bootstrapped floats are equal."""
    share: float = Field(0.9, gt=0, le=1)
    """Of the real neurons' variance, what the common directions carry; the rest is independent noise."""
    norm_source: NormFill = "joint"
    """Whether bias and normalisation entries are one real channel's (Gaussian: drawn with the weights), of
    real channels drawn for each vector (Gaussian: each drawn by itself), or defaults."""

    def fill(
        self, neurons: Neurons, rng: np.random.Generator, channels: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `Weights.fill`."""
        if self.form == "gaussian":
            return self._gaussian(neurons, rng)
        models = distinct(neurons.site.width, neurons.count, rng)

        def draw(gap: Gap, real: Tensor) -> Tensor:
            return bootstrapped(real, neurons.count, rng)

        return assemble(neurons, rng, draw, models, norm_source=self.norm_source, jitter=self.jitter)

    def _gaussian(self, neurons: Neurons, rng: np.random.Generator) -> list[Tensor]:
        width = neurons.site.width
        fits = [Fit(gap, real_rows(gap, width, rng)) for gap in neurons.gaps]
        axes = directions([fit.centred for fit in fits if fit.weights], self.share)
        shared = rng.standard_normal((neurons.count, axes.shape[1]))
        values = []
        for fit in fits:
            if fit.weights or self.norm_source == "joint":
                values.append(fit.drawn(axes, shared, rng))
            elif self.norm_source == "independent":
                values.append(fit.drawn(axes, rng.standard_normal(shared.shape), rng))
            else:
                values.append(fit.default(neurons.count))
        return values


class Fit:
    """A normal distribution of what real neurons have in one slot; of variances the logarithm has it.

    Args:
        gap: The gap to fill.
        real: Rows of the real neurons, ``(width, partners, unit)``.

    Attributes:
        weights: Whether it is of weights.
        centred: The real rows less their mean, ``(width, entries)``, float64.
    """

    def __init__(self, gap: Gap, real: Tensor) -> None:
        self.gap, self.real = gap, real
        self.weights = gap.slot.role in (Role.INCOMING, Role.OUTGOING)
        rows = real.flatten(1).double()
        self._logarithmic = gap.slot.role is Role.VARIANCE and bool((rows > 0).all())
        rows = rows.log() if self._logarithmic else rows
        # A constant stays one to the bit: a rounded mean beside it would stand out.
        self._constant = (rows == rows[0]).all(0)
        self._mean = torch.where(self._constant, rows[0], rows.mean(0))
        self._range = rows.amin(0), rows.amax(0)
        self.centred = rows - self._mean

    def drawn(self, axes: Tensor, normal: NDArray[np.float64], rng: np.random.Generator) -> Tensor:
        """Values for the gap.

        Args:
            axes: From `directions`.
            normal: Standard normal numbers, ``(count, axes)``.
            rng: For what no axis carries.
        """
        degrees = max(len(self.centred) - 1, 1)
        carried = axes.to(self.centred).T @ self.centred
        variance = (self.centred.square().sum(0) - carried.square().sum(0)).clamp_min(0) / degrees
        own = torch.from_numpy(rng.standard_normal((len(normal), len(variance)))).to(carried)
        common = torch.from_numpy(normal).to(carried) @ carried / degrees**0.5
        rows = self._mean + common + variance.sqrt() * own
        if self._logarithmic:
            rows = rows.clamp(*self._range).exp()
        rows = torch.where(self._constant, self.real.flatten(1)[0].double(), rows)
        return finished(rows.view(-1, *self.real.shape[1:]), self.gap)

    def default(self, count: int) -> Tensor:
        """The layer's defaults for the gap."""
        return placed(
            self.real.new_full((count, *self.real.shape[1:]), DEFAULTS[self.gap.slot.role]), self.gap
        )


def directions(parts: Sequence[Tensor], share: float) -> Tensor:
    """What sums of real neurons vary most, in all parts taken together, each of which counts alike.

    Args:
        parts: Centred rows of the real neurons in one slot each, ``(width, entries)``.
        share: Of the variance, what is to be carried, in (0, 1].

    Returns:
        Orthonormal columns, ``(width, axes)``, as few as carry the share; on the CPU.
    """
    grams = [(part @ part.T).cpu() for part in parts]
    gram = torch.stack([g / g.trace().clamp_min(1e-300) for g in grams]).sum(0)
    values, axes = torch.linalg.eigh(gram)
    carried = values.flip(0).clamp_min(0).cumsum(0)
    enough = int((carried < share * carried[-1]).sum()) + 1
    largest: Tensor = axes.flip(1)[:, :enough]
    return largest
