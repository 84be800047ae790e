"""Run a network again and again with some of its tensors changed, only as far as the change reaches.

A network is run on a few inputs under observation, with no confusion channels, with one at each site, and
with many, and on more inputs: the operators that it calls must be the same each time, and the integers that
they are given (sizes of views, groups) linear in the numbers of channels and of inputs. Then the operators
can be run without the network.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepenc.network.structure import named_tensors

FEW = 2
"""Inputs of a run under observation; a single one may have kernels of its own."""
MORE = ""
"""Counts the inputs beyond those, as the name of a site counts its channels."""


class UnfitError(Exception):
    """The network cannot be run so; never leaves `deepenc.encryption`."""


class Ref(NamedTuple):
    """A tensor: result ``part`` of operator ``node``, or the network's tensor ``name``, or the input."""

    node: int = -1
    part: int = 0
    name: str = ""


class Linear(NamedTuple):
    """An integer that follows the numbers of confusion channels, and of inputs."""

    start: int
    steps: tuple[tuple[str, int], ...]


@dataclass
class Call:
    """One operator and what it is given: `Ref` for tensors, `Linear`, or the values themselves."""

    op: Any
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass
class ReplayState:
    """Results of all operators on all batches for one allocation."""

    counts: dict[str, int]
    results: list[list[Any]]


class Program:
    """The operators of a network.

    Args:
        build: Makes the network for an allocation.
        most: The largest counts that will be asked for.
        inputs: To observe it on, ``(inputs, ...)``; a few are enough.
        touches: Tensor name to the sites whose channels lie in it.
        read: What is wanted of a network and inputs, in place of its output.

    Raises:
        UnfitError: They are not the same for all allocations, write in place, are random, or depend on data.
    """

    def __init__(
        self,
        build: Callable[[Mapping[str, int]], nn.Module],
        most: Mapping[str, int],
        inputs: Any,
        touches: Mapping[str, Sequence[str]],
        read: Callable[[nn.Module, Any], Tensor],
    ) -> None:
        if not isinstance(inputs, Tensor):
            raise UnfitError("inputs that are not one tensor")
        alone = [name for name, count in most.items() if count]
        few = inputs[torch.arange(2 * FEW) % len(inputs)]
        ends = {**most, MORE: FEW}
        first, self._out = _record(build({}), few[:FEW], read)
        others = []
        for counts in (*({name: 1} for name in (*alone, MORE)), ends):
            allocation = {name: count for name, count in counts.items() if name != MORE}
            calls, out = _record(build(allocation), few[: FEW + counts.get(MORE, 0)], read)
            if out != self._out or [c.op for c in calls] != [c.op for c in first]:
                raise UnfitError("other operators for other allocations, or other numbers of inputs")
            others.append(calls)
        merge = _Merge((*alone, MORE), ends)
        self._calls = [
            Call(
                calls[0].op,
                merge([c.args for c in calls]),
                merge([c.kwargs for c in calls]),
            )
            for calls in zip(first, *others, strict=True)
        ]
        self._reach(alone, touches)

    def _reach(self, sites: Sequence[str], touches: Mapping[str, Sequence[str]]) -> None:
        """Find out which operators are needed at all, and which of them each site's channels change."""
        parts = [list(_leaves([call.args, call.kwargs])) for call in self._calls]
        needed = np.zeros(len(parts), dtype=bool)
        needed[self._out.node] = True
        for node in reversed(range(len(parts))):
            for leaf in parts[node] if needed[node] else ():
                if isinstance(leaf, Ref) and leaf.node >= 0:
                    needed[leaf.node] = True
        self.needed: NDArray[np.bool_] = needed
        self.reached = {site: np.zeros(len(parts), dtype=bool) for site in sites}
        for node, leaves in enumerate(parts):
            for leaf in leaves:
                if isinstance(leaf, Linear):
                    own = [site for site, _ in leaf.steps]
                else:
                    own = list(touches.get(leaf.name, ()))
                for site, reached in self.reached.items():
                    from_before = isinstance(leaf, Ref) and leaf.node >= 0 and reached[leaf.node]
                    reached[node] |= bool(needed[node] and (site in own or from_before))

    def run(
        self,
        counts: dict[str, int],
        tensors: Mapping[str, Tensor],
        batches: Sequence[Tensor],
        known: Sequence[ReplayState],
    ) -> ReplayState:
        """Run the operators, those alone that have other results than in a known state.

        Args:
            counts: The allocation.
            tensors: Tensors of its network, by name.
            batches: The inputs.
            known: States to start from: the nearest is taken.
        """
        state, todo = None, self.needed
        for candidate in known:
            differ = [s for s in self.reached if counts.get(s, 0) != candidate.counts.get(s, 0)]
            dirty = np.zeros_like(self.needed)
            for site in differ:
                dirty |= self.reached[site]
            if dirty.sum() < todo.sum() or state is None:
                state, todo = candidate, dirty
        found = []
        for index, batch in enumerate(batches):
            sizes = counts | {MORE: len(batch) - FEW}
            results = list(state.results[index]) if state else [None] * len(self._calls)
            for node in np.flatnonzero(todo).tolist():
                call = self._calls[node]
                args = [_filled(arg, results, tensors, batch, sizes) for arg in call.args]
                kwargs = {k: _filled(arg, results, tensors, batch, sizes) for k, arg in call.kwargs.items()}
                results[node] = call.op(*args, **kwargs)
            found.append(results)
        return ReplayState(counts, found)

    def outputs(self, state: ReplayState) -> list[Tensor]:
        """What is wanted of the network for each batch."""
        node, part, _ = self._out
        outs = [results[node] for results in state.results]
        return [out[part] if isinstance(out, tuple | list) else out for out in outs]


def _filled(
    arg: Any, results: list[Any], tensors: Mapping[str, Tensor], batch: Tensor, sizes: Mapping[str, int]
) -> Any:
    if type(arg) is Ref:
        if arg.node >= 0:
            result = results[arg.node]
            return result[arg.part] if isinstance(result, tuple | list) else result
        return tensors[arg.name] if arg.name else batch
    if type(arg) is Linear:
        return arg.start + sum(step * sizes.get(site, 0) for site, step in arg.steps)
    if type(arg) is list:
        return [_filled(part, results, tensors, batch, sizes) for part in arg]
    return arg


def _leaves(value: Any) -> Any:
    if isinstance(value, Ref | Linear):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


class _Merge:
    """Makes one template of what an operator was given for no channel, for one of each kind, and for most."""

    def __init__(self, sites: Sequence[str], most: Mapping[str, int]) -> None:
        self._sites, self._most = sites, most

    def __call__(self, seen: Sequence[Any]) -> Any:
        first = seen[0]
        if isinstance(first, list) and all(isinstance(o, list) and len(o) == len(first) for o in seen):
            return [self(parts) for parts in zip(*seen, strict=True)]
        if isinstance(first, dict) and all(isinstance(o, dict) and o.keys() == first.keys() for o in seen):
            return {key: self([o[key] for o in seen]) for key in first}
        if any(type(other) is not type(first) for other in seen):
            raise UnfitError("arguments of other types for other allocations")
        if isinstance(first, Tensor):
            if not all(torch.equal(first, other) for other in seen):
                raise UnfitError("other constants for other allocations")
            return first
        if all(other == first for other in seen):
            return first
        if type(first) is not int:
            raise UnfitError("other numbers for other allocations")
        steps = {site: one - first for site, one in zip(self._sites, seen[1:-1], strict=True)}
        if seen[-1] != first + sum(step * self._most[site] for site, step in steps.items()):
            raise UnfitError("sizes that are not linear in the numbers of channels")
        return Linear(first, tuple((site, step) for site, step in steps.items() if step))


def _record(
    network: nn.Module, batch: Tensor, read: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[list[Call], Ref]:
    recorder = _Recorder()
    recorder.known[_place(batch)] = Ref()
    for name, tensor in named_tensors(network).items():
        recorder.known.setdefault(_place(tensor), Ref(name=name))
    try:
        with torch.no_grad(), recorder:
            out = torch.func.functionalize(lambda images: read(network, images))(batch)
    except (RuntimeError, NotImplementedError) as error:
        raise UnfitError(str(error)) from error
    found = recorder.known.get(_place(out)) if isinstance(out, Tensor) else None
    if found is None or found.node < 0:
        raise UnfitError("an output that no operator made")
    return recorder.calls, found


def _place(tensor: Tensor) -> Hashable:
    """What tells tensors apart while they live: the memory they lie in, and how."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class _Recorder(TorchDispatchMode):
    """Notes each operator that is run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: list[Call] = []
        self.known: dict[Hashable, Ref] = {}
        self._alive: list[Any] = []  # memory that is known must not be used again for something else

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        if op._schema.is_mutable or op is torch.ops.aten._local_scalar_dense.default:
            raise UnfitError(f"{op} writes in place or lets data decide")
        if _random(op, args, kwargs):
            raise UnfitError(f"{op} is random")
        noted = Call(op, self._noted(list(args)), self._noted(kwargs))
        result = op(*args, **kwargs)
        for part, tensor in enumerate(result if isinstance(result, tuple | list) else (result,)):
            if isinstance(tensor, Tensor):
                self.known[_place(tensor)] = Ref(len(self.calls), part)
        self._alive.append((args, kwargs, result))
        self.calls.append(noted)
        return result

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.known.get(_place(value), value)
        if isinstance(value, list | tuple):
            return [self._noted(part) for part in value]
        if isinstance(value, dict):
            return {key: self._noted(part) for key, part in value.items()}
        return value


def _random(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    named = {argument.name: argument.default_value for argument in op._schema.arguments}
    named |= dict(zip(named, args, strict=False)) | kwargs
    return bool(named.get("dropout_p", 1.0) != 0)
