"""Hypothesis strategies: random small networks, built from the layers and shapes that real ones use."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from torch import nn

from tests.stories.random_networks import (
    ACTIVATIONS,
    BLOCKS,
    CHANGES,
    GATHERINGS,
    POOLS,
    TAKES,
    Options,
    Plan,
    Shape,
    Step,
    channel_dim,
    made,
)

LARGEST = 600  # entries of a value, without the batch


def _divisors(number: int, least: int = 2) -> list[int]:
    return [d for d in range(least, number + 1) if number % d == 0]


def _single(draw: st.DrawFn, first: int, shape: Shape) -> tuple[str, tuple[int, ...], Options]:
    """A step with one input."""
    rank, c = len(shape), shape[channel_dim(shape)]
    widths = st.integers(1, 6)
    halves = [d for d in _divisors(c) if d < 5]
    kinds = ["linear"] * 12 if rank < 4 else ["conv"] * 16
    kinds += ["block"] * 6 + ["activation"] * 2
    kinds += [
        draw(st.sampled_from(["layer norm", "scale", "shift", "change", "slice", "pad", "fixed view"]))
    ] * 3
    kinds += ["chunk", "fold", "glu"] if halves else []
    kinds += ["split"] if c > 1 else []
    if rank == 4:
        kinds += ["batch norm", "group norm", "instance norm", "prelu", "pool", "gather", "gather"]
        kinds += ["transposed", "place"] + (["shuffle"] if halves else [])
    if rank == 3:
        kinds += ["attention", "attention", "take", "place"]
    if rank == 2:
        kinds += ["batch norm", "map"]
    kind = draw(st.sampled_from(kinds))
    options: Options = {}
    if kind in ("conv", "transposed"):
        groups = draw(st.sampled_from([1, 1, c, *_divisors(c, 1)]))
        options = {"out_channels": groups * draw(st.integers(1, 2 if groups > 2 else 6)), "groups": groups}
        options["kernel_size"] = kernel = draw(st.sampled_from([1, 3] if kind == "conv" else [1, 2]))
        options["stride"] = draw(st.integers(1, 2))
        options["bias"] = draw(st.booleans())
        if kind == "conv":
            options["dilation"] = draw(st.integers(1, 2))
            options["padding"] = (kernel // 2) * options["dilation"]
    elif kind == "linear":
        options = {"out_features": draw(widths), "bias": draw(st.booleans())}
    elif kind == "batch norm":
        options = {"affine": draw(st.booleans()), "track_running_stats": draw(st.booleans())}
    elif kind == "group norm":
        options = {"num_groups": draw(st.sampled_from(_divisors(c, 1))), "affine": draw(st.booleans())}
    elif kind == "layer norm":
        options = {"norm": draw(st.sampled_from(["LayerNorm", "RMSNorm"]))}
    elif kind in TABLES:
        options = {"name": draw(st.sampled_from(sorted(TABLES[kind])))}
    elif kind == "block":
        options = {"name": draw(st.sampled_from(sorted(BLOCKS))), "hidden": draw(widths)}
    elif kind in ("shuffle", "chunk", "fold"):
        options = {"groups" if kind == "shuffle" else "parts": draw(st.sampled_from(halves))}
    elif kind == "pad":
        options = {"before": draw(st.integers(0, 2)), "after": draw(st.integers(0, 2))}
    elif kind == "map":
        options = {"side": draw(st.sampled_from([1] + ([2] if c % 4 == 0 else [])))}
    elif kind == "attention":
        heads = draw(st.integers(1, 3))
        options = {"heads": heads, "width": heads * draw(st.integers(1, 3))}
        options |= {"fused": draw(st.booleans()), "bias": draw(st.booleans())}
    elif kind == "split":
        options = {"at": draw(st.integers(1, c - 1))}
    elif kind == "slice":
        start = draw(st.integers(0, c - 1))
        options = {"start": start, "stop": draw(st.integers(start + 1, c))}
    return kind, (first,), options


TABLES = {"activation": ACTIVATIONS, "pool": POOLS, "change": CHANGES, "gather": GATHERINGS, "take": TAKES}


def _joint(draw: st.DrawFn, first: int, shapes: Sequence[Shape]) -> Step | None:
    """A step with several inputs, where there are any that fit."""
    shape = shapes[first]
    dim = channel_dim(shape)
    alike = [i for i, other in enumerate(shapes) if other == shape]
    gates = [i for i, s in enumerate(shapes) if s == shape or (len(s) == 4 and s == (*shape[:2], 1, 1))]
    besides = [
        i for i, s in enumerate(shapes) if (*s[:dim], *s[dim + 1 :]) == (*shape[:dim], *shape[dim + 1 :])
    ]
    besides = [i for i in besides if len(shapes[i]) == len(shape)]
    kind = draw(st.sampled_from(["add", "add", "multiply", "cat", "cat"]))
    others = {"add": alike, "multiply": gates, "cat": besides}[kind]
    if not others:
        return None
    count = 1 if kind == "multiply" else draw(st.integers(1, 2))
    return Step(kind, (first, *(draw(st.sampled_from(others)) for _ in range(count))))


def _repeated(draw: st.DrawFn, first: int, shapes: Sequence[Shape], steps: Sequence[Step]) -> Step | None:
    """A layer used once more: the same, or another with its weight, or its weight transposed."""
    entering = {number: shapes[step.inputs[0]] for number, step in enumerate(steps)}
    layers = [n for n, step in enumerate(steps) if step.kind in ("conv", "linear", "batch norm", "scale")]
    fitting = [n for n in layers if len(entering[n]) == len(shapes[first])]
    fitting = [n for n in fitting if _channels(entering[n]) == _channels(shapes[first])]
    back = [
        n
        for n, step in enumerate(steps)
        if step.kind == "linear"
        and len(shapes[first]) < 4
        and step.options["out_features"] == shapes[first][-1]
    ]
    kind = draw(st.sampled_from(["again", "tied", "transpose"]))
    chosen = back if kind == "transpose" else fitting
    return Step(kind, (first,), {"step": draw(st.sampled_from(chosen))}) if chosen else None


def _channels(shape: Shape) -> int:
    return shape[channel_dim(shape)]


@st.composite
def plans(draw: st.DrawFn, longest: int = 12) -> Plan:
    """Any network of up to `longest` steps whose values stay small."""
    words = draw(st.sampled_from([False] * 5 + [True]))
    side = draw(st.integers(2, 6))
    entry: Shape = (-side,) if words else (draw(st.integers(1, 3)), side, side)
    entry = entry[: draw(st.sampled_from([3, 3, 3, 3, 1, 2]))]
    shapes: list[Shape] = [tuple(Plan(entry, (), ()).example().shape)]
    steps: list[Step] = []
    modules: list[nn.Module] = []
    for number in range(draw(st.integers(2, longest))):
        if words and not number:
            step = Step("embedding", (0,), {"embedding_dim": draw(st.integers(1, 6))})
        else:
            step = _step(draw, shapes, steps, words)
        try:
            module, results = made(Plan(entry, tuple(steps), ()), step, shapes, modules)
        except (RuntimeError, ValueError):
            continue  # a map too small for its kernel, and the like
        if all(_small(shape) for shape in results):
            steps.append(step)
            modules.append(module)
            shapes += results
    last = len(shapes) - 1
    outputs = [(last, draw(st.sampled_from([True, True, True, False])))]
    if last > 1 and draw(st.sampled_from([False, False, True])):
        outputs.append((draw(st.integers(1, last - 1)), draw(st.booleans())))
    return Plan(entry, tuple(steps), tuple(outputs))


def _step(draw: st.DrawFn, shapes: Sequence[Shape], steps: Sequence[Step], words: bool) -> Step:
    recent = range(len(shapes) - 1, max(int(words), len(shapes) - 4) - 1, -1)
    first = draw(st.sampled_from([recent[0]] * 3 + list(recent)))
    how = draw(st.sampled_from(["single"] * 5 + ["joint", "joint", "repeated"]))
    step = None
    if how == "joint":
        step = _joint(draw, first, [(-1,) if words else shapes[0], *shapes[1:]])
    elif how == "repeated":
        step = _repeated(draw, first, shapes, steps)
    return step or Step(*_single(draw, first, shapes[first]))


def _small(shape: Shape) -> bool:
    return min(shape) > 0 and math.prod(shape[1:]) <= LARGEST
