"""Follow a network's operators while it runs once.

A copy of the network is run under a dispatch mode, which sees each ATen operator with its arguments. What it
returns is kept: the proof compares with it. A network on the meta device is followed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepenc.errors import TraceError
from deepenc.network.calling import call, fresh
from deepenc.network.guard import first_line, foreign, seeded
from deepenc.network.structure import copy_around, fresh_tensors, named_tensors
from deepenc.network.tracing.admit import admit, tensors_in
from deepenc.network.tracing.axes import Channels
from deepenc.network.tracing.dry import DryRun
from deepenc.network.tracing.known import Known
from deepenc.network.tracing.rules import apply
from deepenc.network.tracing.watch import Left, Reads, Watch


class Tracer(DryRun):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Applies the rule of each operator as it is called."""

    def __init__(self, known: Known, watch: Watch) -> None:
        super().__init__()
        self._seen = known
        self._watch = watch

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (result := self.decomposed(op, args, kwargs or {})) is not NotImplemented:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._watch.before(op, args, kwargs or {}, tensors)
        result = self.run(op, args, kwargs or {})
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        apply(self._seen, op, args, kwargs or {}, outputs)
        self._watch.after(op, tensors, outputs)
        return result


@dataclass(frozen=True, eq=False)
class Traced:
    """A network that was followed.

    Attributes:
        channels: Its channels.
        outputs: What it returned, in eval mode.
        idle: Parameters that the run did not use, by name.
        decided: Whether it looked at values that depend on its input, so that another might take another way.
        left: What the run computed from weights or inputs and left outside of the network.
    """

    channels: Channels
    outputs: list[Tensor]
    idle: frozenset[str]
    decided: bool
    left: Left


def trace(model: nn.Module, example: Any) -> Traced:
    """Run a copy of the network once and tell its channels apart; inside `guarded`.

    Args:
        model: Any network; untouched. It may itself be on the meta device.
        example: A tensor, or a tuple (positional) or dict (keywords) of arguments.

    Raises:
        TraceError: The network does not run on the example, or cannot be followed; says in which module.
    """
    admit(model, example)
    victim = named_tensors(model)
    copied, apart = copy_around(model, fresh_tensors(victim))
    own = named_tensors(copied)
    names: dict[int, str] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), name)  # a tied tensor goes by its first name
    known = Known(names)
    watch = Watch(victim, own, apart, known)
    with foreign("the example cannot be copied", "give tensors, or tuples or dicts of them"):
        inputs = fresh(example)
    outputs, idle = _run(copied, inputs, known, watch)
    kept = {id(tensor) for tensor in outputs}
    del copied, own, apart, names
    left = watch.left(kept)
    return Traced(known.axes.solve(), outputs, idle, watch.decided, left)


def _run(model: nn.Module, example: Any, known: Known, watch: Watch) -> tuple[list[Tensor], frozenset[str]]:
    tracer = Tracer(known, watch)
    for path, module in model.named_modules():
        _follow(known, path, module)
    leaves: Iterable[Any] = tree_leaves(example)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            known.enter(leaf)
    try:
        with Reads(watch), tracer:
            seeded()
            model.eval()
            returned = call(model, example)
    except (Exception, SystemExit) as error:
        if watch.refusal is not None or isinstance(error, TraceError):
            raise watch.refusal or error from None
        raise TraceError(
            f"{type(model).__name__} does not run on the example: {known.where} "
            f"({_kind(model, known.path)}) raised {type(error).__name__}: {first_line(error)}; "
            "give an example input that the network accepts"
        ) from error
    watch.after_all(dict(named_tensors(model)))
    if watch.refusal is not None:
        raise watch.refusal
    with foreign(f"what {type(model).__name__} returns cannot be read", "let it return plain tensors"):
        outputs = tensors_in(returned)
    _leave(known, outputs)
    made = [tensor.clone() for tensor in outputs]  # some networks write to what they have returned
    used = {owner.tensor for owner in known.axes.owners}
    idle = [n for n, p in model.named_parameters() if p.is_floating_point() and n not in used]
    if idle:
        _train(known, tracer, model, example)
        used = {owner.tensor for owner in known.axes.owners}
    return made, frozenset(idle) - used


def _leave(known: Known, outputs: list[Tensor]) -> None:
    """Declare outputs of the network."""
    for tensor in outputs:
        for axis in known.value(tensor).axes:
            known.axes.fix(axis, "it is an output of the network")


def _train(known: Known, tracer: Tracer, model: nn.Module, example: Any) -> None:
    """Follow what runs in training only, too, such as auxiliary heads: it must fit the same widths."""
    known.path.clear()
    if isinstance(example, Tensor):
        example = torch.cat([example, example])  # a BatchNorm wants more than one value
        known.enter(example)
    with suppress(Exception), tracer:  # what does not run needs no room
        model.train()
        _leave(known, tensors_in(call(model, example)))


def _follow(known: Known, path: str, module: nn.Module) -> None:
    """Keep the tracer's path up to date; after an error it still points to the module that raised."""

    def enter(*_: Any) -> None:
        known.path.append(path)

    def leave(*_: Any) -> None:
        known.path.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _kind(model: nn.Module, path: list[str]) -> str:
    return type(model.get_submodule(path[-1])).__name__ if path else "before any module"
