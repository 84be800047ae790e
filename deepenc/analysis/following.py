"""Which BatchNorm directly follows which layer, read from one run of the network and not from its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from deepenc.network.calling import call, removed
from deepenc.network.tracing.admit import tensors_in


@dataclass(eq=False)
class RunValue:
    """A tensor of the run.

    Attributes:
        op: The operator that made it; empty for parameters, buffers and inputs.
        reads: What that operator was given.
        dims: Its dimensions.
        uses: How many operators were given it; being returned by the network counts as one.
    """

    op: str = ""
    reads: tuple[RunValue, ...] = ()
    dims: int = 0
    uses: int = 0


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """A dispatch mode that keeps a `RunValue` of every tensor, and no tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = WeakTensorKeyDictionary()

    def value(self, tensor: Tensor) -> RunValue:
        """What is known of a tensor."""
        known: RunValue | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            known = self._values[tensor] = RunValue(dims=tensor.dim())
        return known

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [self.value(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for value in given:
            value.uses += 1
        result = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf not in self._values:  # what was changed in place is known
                self._values[leaf] = RunValue(op.name().partition(".")[0], tuple(given), leaf.dim())
        return result


class ModuleCall(NamedTuple):
    """A call of a module: its input, its output, and whether it did more to that than to make it."""

    given: RunValue | None
    made: RunValue
    touched: bool


@dataclass(eq=False)
class Run:
    """A run of a network in eval mode.

    Attributes:
        network: The network.
        returned: The tensors that it returned.
        calls: Path of each convolution, linear layer and BatchNorm to its calls.
        names: How many paths every module and every parameter has, by id.
    """

    network: nn.Module
    watch: Watch = field(default_factory=Watch)
    returned: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)
    names: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, network: nn.Module, example: Any) -> Run:
        """Run a network in eval mode on an example; it stays as it is."""
        run = cls(network)
        modules = dict(network.named_modules())
        every = [module for _, module in network.named_modules(remove_duplicate=False)]
        for thing in (*every, *(p for _, p in network.named_parameters(remove_duplicate=False))):
            run.names[id(thing)] = run.names.get(id(thing), 0) + 1
        watched = {p: m for p, m in modules.items() if isinstance(m, _ConvNd | nn.Linear | _BatchNorm)}
        run.calls = {path: [] for path in watched}
        handles = [m.register_forward_hook(partial(run._called, path)) for path, m in watched.items()]
        with removed(handles), torch.no_grad(), run.watch:
            run.returned = tensors_in(call(network, example))
        for tensor in run.returned:
            run.watch.value(tensor).uses += 1
        return run

    def _called(self, path: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            given = self.watch.value(args[0]) if args and isinstance(args[0], Tensor) else None
            made = self.watch.value(output)
            self.calls[path].append(ModuleCall(given, made, made.uses > 0))

    def norms(self) -> dict[str, _BatchNorm]:
        """The BatchNorm layers by path."""
        return {p: m for p, m in self.network.named_modules() if isinstance(m, _BatchNorm)}

    def layer_before(self, norm: str) -> str | None:
        """Path of the convolution or linear layer whose output a BatchNorm got, just so, the first time."""
        given = next((one.given for one in self.calls[norm]), None)
        norms = self.norms()
        return next(
            (
                path
                for path, calls in self.calls.items()
                if path not in norms and given is not None and any(one.made is given for one in calls)
            ),
            None,
        )

    def unnormalised(self) -> list[str]:
        """Paths of the convolutions that ran, on images, and that no BatchNorm follows directly."""
        followed = {self.layer_before(norm) for norm in self.norms()}
        ran = {path: calls[0].made for path, calls in self.calls.items() if calls and path not in followed}
        layers = {path: self.network.get_submodule(path) for path in ran}
        return [p for p, m in layers.items() if isinstance(m, _ConvNd) and ran[p].dims == m.weight.dim()]

    def objections(self, path: str) -> Iterator[str]:
        """Say why a BatchNorm cannot go into the layer before it; nothing where it can."""
        norm, before = self.norms()[path], self.layer_before(path)
        if not self.calls[path]:
            yield "it does not run on the example"
        if norm.training or norm.running_mean is None:
            yield "it normalises by the batch, without running statistics"
        if before is None:
            yield "no convolution or linear layer comes directly before it"
            return
        layer = cast(_ConvNd | nn.Linear, self.network.get_submodule(before))
        for name, module, who in ((path, norm, "it"), (before, layer, before)):
            if len(self.calls[name]) > 1:
                yield f"{who} runs {len(self.calls[name])} times"
            if module._forward_hooks or module._forward_pre_hooks:
                yield f"{who} has hooks"
        made, normed = self.calls[before][0].made, self.calls[path][0]
        if made.uses > 1:
            yield f"the output of {before} is used elsewhere, too"
        if not self._multiplies(layer, made):
            yield f"{before} does more than to multiply by its weight and to add its bias"
        if not self._normalises(norm, normed, made):
            yield "it does more than to normalise"
        for module, who in ((norm, "it"), (layer, before)):
            if self._shared(module):
                yield f"{who} is shared, or its tensors are used elsewhere, too"

    def _shared(self, module: nn.Module) -> bool:
        parameters = [p for p in module._parameters.values() if p is not None]
        tensors = [*parameters, *(b for b in module._buffers.values() if b is not None)]
        return any(self.names[id(thing)] > 1 for thing in (module, *parameters)) or any(
            self.watch.value(tensor).uses > 1 for tensor in tensors
        )

    def _multiplies(self, layer: _ConvNd | nn.Linear, made: RunValue) -> bool:
        """Whether an output, its channels in dimension 1, is a product with the layer's weight, plus bias."""
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if weight is None or made.dims != weight.dim() or len(made.reads) != 2 + (bias is not None):
            return False
        if bias is not None and self.watch.value(bias) not in made.reads:
            return False
        if made.op == "aten::convolution":
            return made.reads[1] is self.watch.value(weight)
        last = made.reads[-1]
        product = made.op in ("aten::addmm", "aten::mm") and last.op == "aten::t" and last.uses == 1
        return product and last.reads[0] is self.watch.value(weight)

    def _normalises(self, norm: _BatchNorm, called: ModuleCall, made: RunValue) -> bool:
        """Whether a call normalised a layer's output by the running statistics, and did nothing else."""
        own = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
        reads = (made, *map(self.watch.value, own))
        return "batch_norm" in called.made.op and called.made.reads == reads and not called.touched
