"""Operators between two layers: where the channels of the first lie then is known by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from deepenc.network.calling import to_device
from deepenc.network.find import find_sites
from deepenc.network.sites import Role, Slot

Use = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
ROW, POINTS, IMAGE, VOLUME = (
    torch.randn(2, *shape, generator=GENERATOR) for shape in ((5,), (3, 4), (3, 4, 4), (3, 2, 4, 4))
)
NODES, EDGES = torch.randn(7, 5, generator=GENERATOR), torch.randint(7, (2, 9), generator=GENERATOR)


class Between(nn.Module):
    """A layer, what happens to its channels, and a layer that reads them."""

    def __init__(self, first: nn.Module, use: nn.Module | Use, last: nn.Module) -> None:
        super().__init__()
        self.first, self.use, self.last = first, use, last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.use(self.first(x)))


MADE = (("weight", Role.INCOMING), ("bias", Role.BIAS))


@dataclass(frozen=True)
class Case:
    """Of the channels of the first layer, ``width`` lie in blocks, from some starts on, here and there."""

    build: Callable[[], nn.Module]
    example: Any
    width: int = 6
    starts: tuple[int, ...] = (0,)
    block: int = 1
    read: tuple[int, ...] = (0,)
    read_block: int = 1
    more: tuple[Slot, ...] = ()
    on_meta: bool = True

    def slots(self) -> set[Slot]:
        made = {
            Slot(f"first.{name}", 0, role, start, self.block) for name, role in MADE for start in self.starts
        }
        read = {Slot("last.weight", 1, Role.OUTGOING, start, self.read_block) for start in self.read}
        return made | read | set(self.more)


def linear(use: nn.Module | Use, made: int = 6, into: int = 6, example: Tensor = ROW, **where: Any) -> Case:
    build = lambda: Between(nn.Linear(5, made), use, nn.Linear(into, 2))  # noqa: E731
    return Case(build, example, **where)


def convolved(use: nn.Module | Use, dims: int = 2, made: int = 6, into: int = 6, **where: Any) -> Case:
    kind, example = [(nn.Conv1d, POINTS), (nn.Conv2d, IMAGE), (nn.Conv3d, VOLUME)][dims - 1]
    return Case(lambda: Between(kind(3, made, 1), use, kind(into, 2, 1)), example, **where)


def pooled(use: Use, **where: Any) -> Case:
    return Case(lambda: Between(nn.Conv1d(3, 6, 1), use, nn.Linear(6, 2)), POINTS, **where)


def affine(name: str = "use") -> tuple[Slot, ...]:
    return Slot(f"{name}.weight", 0, Role.SCALE), Slot(f"{name}.bias", 0, Role.SHIFT)


def unpooled(h: Tensor) -> Tensor:
    small, places = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(small, places, 2)


def gated(h: Tensor) -> Tensor:
    i, f, g, o = torch.unsafe_chunk(h, 4, 1)
    return o.sigmoid() * (f.sigmoid() * torch.zeros_like(i) + i.sigmoid() * g.tanh()).tanh()


def put(h: Tensor) -> Tensor:
    out = h.new_zeros(9, h.shape[1])
    out[EDGES[0].to(h.device)] = h[EDGES[1].to(h.device)]
    return out


def positive(h: Tensor) -> Tensor:
    out = h.clone()
    out[h < 0] = 0.1
    return out


def scattered(h: Tensor) -> Tensor:
    source, target = EDGES.to(h.device)
    index = target[:, None].expand(-1, h.shape[1])
    return torch.zeros(7, h.shape[1], device=h.device).scatter_add(0, index, h[source])


class Numbered(Between):
    """Is given the edges of its graph."""

    def forward(self, x: Tensor, edges: Tensor) -> Any:
        return self.last(self.use(self.first(x), edges))


def largest(h: Tensor, edges: Tensor) -> Tensor:
    index = edges[1][:, None].expand(-1, h.shape[1])
    return torch.zeros_like(h).scatter_reduce(0, index, h[edges[0]], "amax", include_self=False)


def gathered(h: Tensor) -> Tensor:
    return h.gather(0, EDGES[0].to(h.device)[:, None].expand(-1, h.shape[1]))


def regions(h: Tensor) -> Tensor:
    return roi_align(h, h.new_tensor([[0.0, 0, 0, 3, 3], [1.0, 1, 1, 3, 3]]), 2)


def written(h: Tensor) -> Tensor:
    out = h.new_empty(2, h.shape[1], 6)
    out[:, :, 1:5] = h
    out[:, :, :1], out[:, :, 5:] = h[:, :, :1], h[:, :, :1]
    return out


THIRDS = {"width": 2, "starts": (0, 2, 4), "read_block": 3}
FOUND = {
    "one slope": convolved(nn.PReLU()),
    "a slope a channel": convolved(nn.PReLU(6), more=(Slot("use.weight", 0, Role.SCALE),)),
    "slopes of rows": linear(nn.PReLU(6), more=(Slot("use.weight", 0, Role.SCALE),)),
    "random slopes": linear(nn.RReLU()),
    "gated halves": linear(nn.GLU(), made=12, starts=(0, 6)),
    "gates of a cell": linear(gated, made=24, starts=(0, 6, 12, 18)),
    "fake quantisation": linear(
        lambda h: torch.fake_quantize_per_tensor_affine(h, 0.1, 0, -128, 127), on_meta=False
    ),
    "pixel shuffle": convolved(nn.PixelShuffle(2), made=24, block=4),
    "pixel shuffle written out": convolved(
        lambda h: h.view(2, -1, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, -1, 8, 8), made=24, block=4
    ),
    "pixel unshuffle": convolved(nn.PixelUnshuffle(2), into=24, read_block=4),
    "channel shuffle": convolved(nn.ChannelShuffle(3), **THIRDS),
    "channel shuffle written out": convolved(
        lambda h: h.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2), **THIRDS
    ),
    "instance norm of two images": convolved(nn.InstanceNorm2d(6, affine=True), more=affine()),
    "maximum over points": pooled(lambda h: h.max(2)[0]),
    "minimum over points, kept": pooled(lambda h: h.min(-1, keepdim=True)[0].squeeze(-1)),
    "median over points": pooled(lambda h: h.median(2).values),
    "deviation and mean": pooled(lambda h: sum(torch.std_mean(h, 2))),  # type: ignore[arg-type]
    "variance and mean, kept": pooled(lambda h: sum(torch.var_mean(h, -1, keepdim=True)).squeeze(2)),  # type: ignore[union-attr]
    "best two points": pooled(lambda h: h.topk(2, 2).values.sum(2)),
    "sorted points": pooled(lambda h: h.sort(dim=2, stable=True)[0].cumsum(2)[..., -1]),
    "norm over points": pooled(lambda h: h.norm(1, 2)),
    "stacked": linear(lambda h: torch.stack([h, h.relu()], 1).softmax(1)[:, 0]),
    "stacked behind": linear(lambda h: torch.stack([h, h.relu()], -1).amax(-1)),
    "added by number": linear(
        lambda h: torch.zeros_like(h).index_add(0, EDGES[1].to(h.device), h[EDGES[0].to(h.device)]),
        example=NODES,
    ),
    "added into zeros of its width": linear(scattered, example=NODES),
    "largest by number": Case(lambda: Numbered(nn.Linear(5, 6), largest, nn.Linear(6, 2)), (NODES, EDGES)),
    "gathered": linear(gathered, example=NODES),
    "selected": linear(lambda h: h.index_select(0, EDGES[0].to(h.device)), example=NODES),
    "put": linear(put, example=NODES),
    "masked by values": linear(positive),
    "taken": linear(
        lambda h: h.take_along_dim(EDGES[0].to(h.device)[:, None].expand(-1, h.shape[1]), 0), example=NODES
    ),
    "masked by rows": linear(lambda h: h * h.new_ones(2, 1).bool().expand(-1, h.shape[1])),
    "written into parts": convolved(written, dims=1),
    "repeated": pooled(lambda h: h.repeat(1, 1, 2).mean(2)),
    "repeated beside itself": linear(lambda h: h.repeat(1, 2), into=12, read=(0, 6)),
    "each repeated": linear(lambda h: h.repeat_interleave(3, 1), into=18, read_block=3),
    "larger lines": convolved(nn.Upsample(scale_factor=2, mode="linear"), dims=1),
    "larger volumes": convolved(nn.Upsample(scale_factor=2, mode="trilinear"), dims=3),
    "nearest volumes": convolved(nn.Upsample(scale_factor=2), dims=3),
    "reflected lines": convolved(nn.ReflectionPad1d(1), dims=1),
    "reflected images": convolved(nn.ReflectionPad2d(1)),
    "reflected volumes": convolved(nn.ReflectionPad3d(1), dims=3),
    "replicated lines": convolved(nn.ReplicationPad1d(1), dims=1),
    "replicated volumes": convolved(nn.ReplicationPad3d(1), dims=3),
    "circular lines": convolved(nn.CircularPad1d(1), dims=1),
    "circular images": convolved(nn.CircularPad2d(1)),
    "circular volumes": convolved(nn.CircularPad3d(1), dims=3),
    "unpooled": convolved(unpooled),
    "regions": convolved(regions),
    "sampled": convolved(lambda h: F.grid_sample(h, h.new_zeros(2, 3, 3, 2), align_corners=False)),
    "unfolded": Case(
        lambda: Between(nn.Conv2d(3, 6, 1), nn.Unfold(2), nn.Conv1d(24, 2, 1)), IMAGE, read_block=4
    ),
    "folded": Case(
        lambda: Between(nn.Conv1d(3, 24, 1), lambda h: F.fold(h, 4, 2, stride=2), nn.Conv2d(6, 2, 1)),
        POINTS,
        block=4,
    ),
    "seen as a map": Case(
        lambda: Between(nn.Linear(5, 24), lambda h: h.view(2, -1, 2, 2), nn.Conv2d(6, 2, 1)), ROW, block=4
    ),
    "seen as a map, channels last": Case(
        lambda: Between(
            nn.Linear(5, 24), lambda h: h.view(2, 2, 2, -1).permute(0, 3, 1, 2), nn.Conv2d(6, 2, 1)
        ),
        ROW,
        starts=(0, 6, 12, 18),
    ),
    "complex": linear(lambda h: torch.view_as_complex(h.unflatten(1, (-1, 2))).abs(), made=12, block=2),
    "complex and back": linear(
        lambda h: torch.view_as_real(torch.view_as_complex(h.unflatten(1, (-1, 2))) ** 2).flatten(1),
        **{"made": 12, "block": 2, "into": 12, "read_block": 2},
    ),
    "in inference mode": linear(torch.inference_mode()(lambda h: F.relu(h).reshape(2, -1).contiguous())),
}


@pytest.mark.parametrize("name", FOUND)
def test_channels_are_followed(name: str) -> None:
    torch.manual_seed(0)
    case = FOUND[name]
    model = case.build().eval()
    (site,) = find_sites(model, case.example)
    assert (site.name, site.width, site.stream) == ("first", case.width, False)
    assert set(site.slots) == case.slots()
    if case.on_meta:
        assert find_sites(model.to("meta"), to_device(case.example, "meta")) == [site]
