"""Operators that pick or mix along space, channel by channel; and those that turn space into channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from deepenc.network.tracing.axes import merge, split
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules.registry import Result, drop, rule, rule_of_parts

_BY_SPACE = {
    1: "adaptive_max_pool1d upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d reflection_pad1d "
    "replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices mkldnn_max_pool2d avg_pool2d _adaptive_avg_pool2d "
    "mkldnn_adaptive_avg_pool2d adaptive_max_pool2d fractional_max_pool2d upsample_bilinear2d "
    "upsample_nearest2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa reflection_pad2d replication_pad2d",
    3: "max_pool3d_with_indices mkldnn_max_pool3d avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "fractional_max_pool3d upsample_trilinear3d upsample_nearest3d _upsample_nearest_exact3d "
    "reflection_pad3d replication_pad3d",
}
"""By number of spatial dimensions, the last."""


def _resampled(space: int) -> Callable[..., list[Result]]:
    def resample(known: Known, outputs: list[Tensor], x: Tensor, **_: Any) -> list[Result]:
        return [tuple(drop(known, x, range(-space, 0), "resamples it"))] * len(outputs)

    return resample


for _space, _names in _BY_SPACE.items():
    rule_of_parts(*_names.split())(_resampled(_space))


@rule("max_unpool2d", "max_unpool3d")
def _unpool(
    known: Known, outputs: list[Tensor], x: Tensor, indices: Tensor, output_size: Sequence[int], **_: Any
) -> Result:
    space = range(-len(output_size), 0)
    axes, theirs = (drop(known, tensor, space, "resamples it") for tensor in (x, indices))
    pairs = zip(axes, theirs, strict=True)
    return tuple(known.axes.tie(p, q, f"{known.where} puts it at fixed places") for p, q in pairs)


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "_grid_sampler_2d_cpu_fallback")
def _grid_sample(known: Known, outputs: list[Tensor], x: Tensor, grid: Tensor, **_: Any) -> Result:
    drop(known, grid, range(grid.dim()), "samples others by it")
    axes = drop(known, x, range(2, x.dim()), "samples from it")
    return tuple(axes)


@rule("roi_align", "roi_pool")
def _regions(known: Known, outputs: list[Tensor], x: Tensor, rois: Tensor, **_: Any) -> Result:
    drop(known, rois, range(rois.dim()), "cuts regions by it")
    return tuple(drop(known, x, (0, 2, 3), "cuts regions from it"))


@rule("pixel_shuffle")
def _pixel_shuffle(known: Known, outputs: list[Tensor], x: Tensor, upscale_factor: int) -> Result:
    """Each channel of the result was a block of channels."""
    axes = drop(known, x, (-2, -1), "resamples it")
    sizes = (outputs[0].shape[-3], upscale_factor, upscale_factor)
    axes[-3], *places = split(known.axes, axes[-3], sizes, f"{known.where} rearranges it")
    for place in places:
        known.axes.fix(place, f"{known.where} makes places of it")
    return tuple(axes)


@rule("pixel_unshuffle")
def _pixel_unshuffle(known: Known, outputs: list[Tensor], x: Tensor, downscale_factor: int) -> Result:
    axes = drop(known, x, (-2, -1), "resamples it")
    parts = [(axes[-3], x.shape[-3]), (None, downscale_factor**2)]
    axes[-3] = merge(known.axes, parts, f"{known.where} rearranges it")
    return tuple(axes)


@rule("im2col")
def _im2col(known: Known, outputs: list[Tensor], x: Tensor, kernel_size: Sequence[int], **_: Any) -> Result:
    *before, channels, _height, _width = drop(known, x, (-2, -1), "slides over it")
    parts = [(channels, x.shape[-3]), (None, outputs[0].shape[-2] // x.shape[-3])]
    return (*before, merge(known.axes, parts, f"{known.where} rearranges it"), None)


@rule("col2im")
def _col2im(known: Known, outputs: list[Tensor], x: Tensor, kernel_size: Sequence[int], **_: Any) -> Result:
    *before, columns, _places = drop(known, x, [-1], "slides over it")
    sizes = (outputs[0].shape[-3], *kernel_size)
    channels, *places = split(known.axes, columns, sizes, f"{known.where} rearranges it")
    for place in places:
        known.axes.fix(place, f"{known.where} makes places of it")
    return (*before, channels, None, None)


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(known: Known, outputs: list[Tensor], x: Tensor, groups: int) -> Result:
    axes, why = list(known.value(x).axes), f"{known.where} rearranges it"
    width = x.shape[1] // groups
    group, within = split(known.axes, axes[1], (groups, width), why)
    axes[1] = merge(known.axes, [(within, width), (group, groups)], why)
    return tuple(axes)
