"""Statistics of a channel as a whole: its own entries, and how its two sides and its entries go together."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from deepenc.analysis.features import statistics
from deepenc.analysis.features.formulas import TINY
from deepenc.analysis.features.parts import SiteChannels
from deepenc.network.sites import Role

PAIRS = 1024
"""Channels whose pairs set a slope; of wider sites as many, evenly spaced."""


def bias(channels: SiteChannels) -> Tensor | None:
    """Bias of the channel's own layer."""
    return channels.role(Role.BIAS)


def shift(channels: SiteChannels) -> Tensor | None:
    """Offset of a normalisation."""
    return channels.role(Role.SHIFT)


def scale(channels: SiteChannels) -> Tensor | None:
    """Factor of a normalisation."""
    return channels.role(Role.SCALE)


def centre(channels: SiteChannels) -> Tensor | None:
    """Running mean of a BatchNorm."""
    return channels.role(Role.MEAN)


def variance(channels: SiteChannels) -> Tensor | None:
    """Logarithm of the running variance of a BatchNorm."""
    return _log(channels.role(Role.VARIANCE))


def variance_given_in(channels: SiteChannels) -> Tensor | None:
    """Log running variance less twice the log norm of the incoming weights."""
    log, norm = variance(channels), _norm_in(channels)
    return None if log is None or norm is None else log - 2 * norm


def out_given_scale(channels: SiteChannels) -> Tensor | None:
    """Log norm of the outgoing weights, less what the log of the normalisation's factor lets expect."""
    return _residual(_norm_out(channels), _log(scale(channels)))


def out_given_in(channels: SiteChannels) -> Tensor | None:
    """Log norm of the outgoing weights, less what that of the incoming lets expect."""
    return _residual(_norm_out(channels), _norm_in(channels))


def balance(channels: SiteChannels) -> Tensor | None:
    """Log ratio of the squared norms of the incoming weights, bias included, and of the outgoing ones."""
    incoming, outgoing = _norm_in(channels), _norm_out(channels)
    if incoming is None or outgoing is None:
        return None
    own = bias(channels)
    square = (2 * incoming).exp() + (0 if own is None else own.square())
    return square.clamp_min(TINY**2).log() - 2 * outgoing


def _norm_in(channels: SiteChannels) -> Tensor | None:
    return None if channels.incoming is None else statistics.norm(channels.incoming)


def _norm_out(channels: SiteChannels) -> Tensor | None:
    return None if channels.outgoing is None else statistics.norm(channels.outgoing)


def _log(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.abs().clamp_min(TINY).log()


def _residual(y: Tensor | None, x: Tensor | None) -> Tensor | None:
    """What a line through the medians, of the median slope of all pairs (Theil and Sen), leaves of ``y``."""
    if y is None or x is None:
        return None
    chosen = np.arange(min(len(x), PAIRS)) * len(x) // min(len(x), PAIRS)
    some_x, some_y = x.numpy()[chosen], y.numpy()[chosen]
    run = np.subtract.outer(some_x, some_x)
    slopes = np.subtract.outer(some_y, some_y)[run > 0] / run[run > 0]
    residual = y - (float(np.median(slopes)) if len(slopes) else 0.0) * x
    return residual - float(np.median(residual.numpy()))
