"""Small networks made from plans: what a strategy draws, and what a counterexample prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Options = dict[str, Any]
BATCH = 2


@dataclass(frozen=True)
class Step:
    """One operation: which values it takes (0 is the input) and its options; it appends its results."""

    kind: str
    inputs: tuple[int, ...]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A network.

    Attributes:
        entry: Shape of the input without its batch; negative first number: that many word indices.
        steps: In order.
        outputs: Which values are returned, each behind a linear head or as it is.
    """

    entry: Shape
    steps: tuple[Step, ...]
    outputs: tuple[tuple[int, bool], ...]

    @property
    def words(self) -> bool:
        return self.entry[0] < 0

    def example(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.words:
            return torch.randint(0, 7, (BATCH, -self.entry[0]), generator=generator)
        return torch.randn(BATCH, *self.entry, generator=generator, dtype=torch.float64)


class Do(nn.Module):
    """A function of values, with parameters of its own."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *values: Tensor) -> Any:
        return self.function(self, *values)


def channel_dim(shape: Shape) -> int:
    """Channels are last in vectors and tokens, and second in maps."""
    return 1 if len(shape) == 4 else len(shape) - 1


def per_channel(shape: Shape) -> Shape:
    return (shape[1], 1, 1) if len(shape) == 4 else (shape[-1],)


def _excite(do: Any, x: Tensor, dim: int) -> Tensor:
    places = tuple(range(2, 4)) if x.dim() == 4 else tuple(range(1, dim))
    squeezed = x.mean(places, keepdim=True) if places else x
    return x * do.last(do.first(squeezed).relu()).sigmoid()


BLOCKS: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "residual": lambda do, x, _: x + do.last(do.first(x).relu()),
    "gated": lambda do, x, _: do.last(F.silu(do.first(x)) * do.second(x)),
    "dense": lambda do, x, dim: do.grown(torch.cat([x, do.first(x)], dim).relu()),
    "parallel": lambda do, x, dim: do.last((do.first(x) + do.second(x)).relu()),
    "excite": _excite,
}


def _shuffle(groups: int) -> Callable[[Any, Tensor], Tensor]:
    def run(_: Any, x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    return run


def _attend(heads: int, fused: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(do: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (do.q(x), do.k(x), do.v(x)))
        if fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v
        return do.out(mixed.transpose(1, 2).flatten(2))

    return run


def _channels_last(norm: nn.Module) -> nn.Module:
    return Do(lambda do, x: do.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": lambda x: F.silu(x.clone(), inplace=True),
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "absolute": torch.abs,
    "one less": lambda x: 1 - x,
    "clamp": lambda x: x.clamp(-1, 1),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average": lambda x: F.avg_pool2d(x, 2, 1, 0),
    "one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "two": lambda x: F.adaptive_avg_pool2d(x, 2),
    "spread": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, size=(3, 3), mode="bilinear", align_corners=False),
    "frame": lambda x: F.pad(x, (1, 0, 1, 0)),
    "crop": lambda x: x[:, :, 1:, :-1],
}
CHANGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": lambda x, dim: x.softmax(dim),
    "sum": lambda x, dim: x.cumsum(dim),
    "flip": lambda x, dim: x.flip(dim),
    "roll": lambda x, dim: x.roll(1, dim),
    "norm": lambda x, dim: F.normalize(x, dim=dim),
    "gate": lambda x, dim: x * x.mean(dim, keepdim=True).sigmoid(),
    "own scale": lambda x, dim: x * x.shape[dim] ** -0.5,
    "own mean": lambda x, dim: x / x.shape[dim],
}
GATHERINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "flatten last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "mean": lambda x: x.mean((-2, -1)),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "rows": lambda x: x.permute(0, 2, 3, 1).flatten(2),
}
TAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "first": lambda x: x[:, 0],
    "flatten": lambda x: x.flatten(1),
    "square": lambda x: x.transpose(1, 2) @ x,
}


def build(shapes: Sequence[Shape], kind: str, o: Options) -> nn.Module:
    """The module of a step; `shapes` are those of its inputs, with the batch."""
    shape = shapes[0]
    dim = channel_dim(shape)
    c = shape[dim]
    match kind:
        case "conv":
            return nn.Conv2d(c, **o)
        case "transposed":
            return nn.ConvTranspose2d(c, **o)
        case "linear":
            return nn.Linear(c, **o)
        case "embedding":
            return nn.Embedding(7, **o)
        case "batch norm":
            return (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(c, **o)
        case "group norm":
            return nn.GroupNorm(num_channels=c, **o)
        case "instance norm":
            return nn.InstanceNorm2d(c, affine=True)
        case "layer norm":
            norm = getattr(nn, o["norm"])(c)
            return _channels_last(norm) if len(shape) == 4 else norm
        case "activation":
            return Do(lambda _, x: ACTIVATIONS[o["name"]](x))
        case "prelu":
            return nn.PReLU(c)
        case "pool":
            return Do(lambda _, x: POOLS[o["name"]](x))
        case "change":
            return Do(lambda _, x: CHANGES[o["name"]](x, dim))
        case "gather":
            return Do(lambda _, x: GATHERINGS[o["name"]](x))
        case "take":
            return Do(lambda _, x: TAKES[o["name"]](x))
        case "block":
            layer = partial(nn.Conv2d, kernel_size=1) if len(shape) == 4 else nn.Linear
            return Do(
                lambda do, x: BLOCKS[o["name"]](do, x, dim),
                first=layer(c, o["hidden"]),
                second=layer(c, o["hidden"]),
                last=layer(o["hidden"], c),
                grown=layer(c + o["hidden"], 2),
            )
        case "glu":
            return Do(lambda _, x: F.glu(x, dim))
        case "shuffle":
            return Do(_shuffle(o["groups"]))
        case "scale":
            return Do(lambda do, x: x * do.weight, weight=torch.ones(per_channel(shape)))
        case "shift":
            return Do(lambda do, x: x + do.weight, weight=torch.zeros(per_channel(shape)))
        case "place":
            return Do(lambda do, x: x + do.weight, weight=torch.zeros(shape[1:]))
        case "pad":
            return Do(lambda _, x: F.pad(x, (0, 0) * (len(shape) - 1 - dim) + (o["before"], o["after"])))
        case "map":
            return Do(lambda _, x: x.view(BATCH, -1, o["side"], o["side"]))
        case "attention":
            parts = {name: nn.Linear(c, o["width"], bias=o["bias"]) for name in "qkv"}
            return Do(_attend(o["heads"], o["fused"]), **parts, out=nn.Linear(o["width"], c))
        case "chunk":
            return Do(lambda _, x: x.chunk(o["parts"], dim))
        case "split":
            return Do(lambda _, x: x.split([o["at"], c - o["at"]], dim))
        case "slice":
            return Do(lambda _, x: x.narrow(dim, o["start"], o["stop"] - o["start"]))
        case "fold":
            return Do(lambda _, x: x.unflatten(dim, (o["parts"], -1)).sum(dim))
        case "fixed view":
            return Do(lambda _, x: x.view(shape))
        case "add":
            return Do(lambda _, *values: sum(values[1:], values[0]))
        case "multiply":
            return Do(lambda _, a, b: a * b)
        case "cat":
            return Do(lambda _, *values: torch.cat(values, dim))
    raise AssertionError(kind)


class Random(nn.Module):
    """The network of a plan, with weights of a seed, in double precision."""

    def __init__(self, plan: Plan, seed: int = 0) -> None:
        super().__init__()
        self.plan = plan
        shapes = [plan.example().shape]
        modules: list[nn.Module] = []
        for step in plan.steps:
            module, results = made(plan, step, shapes, modules)
            modules.append(module)
            shapes += results
        self.steps = nn.ModuleList(modules)
        self.heads = nn.ModuleList(
            _head(shapes[index]) if head else nn.Identity() for index, head in plan.outputs
        )
        self.double().eval()
        _randomise(self, torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step, module in zip(self.plan.steps, self.steps, strict=True):
            result = module(*(values[i] for i in step.inputs))
            values += [result] if isinstance(result, Tensor) else result
        outputs = [head(values[i]) for (i, _), head in zip(self.plan.outputs, self.heads, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _head(shape: Shape) -> nn.Module:
    return nn.Conv2d(shape[1], 2, 1) if len(shape) == 4 else nn.Linear(shape[-1], 3)


def made(
    plan: Plan, step: Step, shapes: Sequence[Shape], modules: Sequence[nn.Module]
) -> tuple[nn.Module, list[Shape]]:
    """A step's module and the shapes that it returns."""
    entering = [shapes[i] for i in step.inputs]
    if step.kind == "again":
        module = modules[step.options["step"]]
    elif step.kind == "tied":
        other = plan.steps[step.options["step"]]
        module = build(entering, other.kind, other.options)
        module.weight = modules[step.options["step"]].weight  # type: ignore[assignment]
    elif step.kind == "transpose":
        other_module = modules[step.options["step"]]
        module = Do(lambda do, x: x @ do.weight)
        module.weight = other_module.weight  # type: ignore[assignment]
    else:
        module = build(entering, step.kind, step.options)
    dtype = torch.long if plan.words and step.inputs == (0,) else torch.float32
    with torch.no_grad():
        result = module.float().eval()(*(torch.ones(shape, dtype=dtype) for shape in entering))
    return module, [tuple(x.shape) for x in ([result] if isinstance(result, Tensor) else result)]


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Values as if trained: none zero, none equal, variances and the like positive."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            values = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                values = values.abs() + 0.5
            elif tensor.dim() > 1:
                values /= math.sqrt(tensor[0].numel()) / 1.5
            else:
                values = values * 0.3 + (1.0 if name.endswith("weight") else 0.0)
            tensor.copy_(values)
