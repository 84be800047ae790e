"""Watch a copy of a network run: it must compute with its own tensors, and leave them as they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepenc.errors import TraceError
from deepenc.network.tracing.known import Known

_READS = {
    "data_ptr",
    "tolist",
    "numpy",
    "__array__",
    "__dlpack__",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
}
_DECIDES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


Left = dict[int, tuple[weakref.ref[Tensor], str]]
"""Tensors by ``id``, each with the module that made it."""


class Watch:
    """Refuses what an exact copy cannot do, by the module that does it.

    Args:
        victim: The tensors of the network that was copied; the copy has others in their place.
        own: The copy's, by the same names.
        apart: Tensors of the copy that the network's own tensors do not reach; see `copy_around`.
        known: Says which module runs, and what depends on the input.

    Attributes:
        refusal: The first thing to be refused; to be raised after the run, since a network may catch it.
        decided: Whether the network looked at values that depend on its input.
        derived: What was computed from the network's tensors or its input, with the module that did.
    """

    def __init__(
        self,
        victim: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        apart: Mapping[Tensor, str],
        known: Known,
    ) -> None:
        self.refusal: TraceError | None = None
        self.decided = False
        self.derived: Left = {}
        self._known = known
        self._victim = {_place(tensor): name for name, tensor in victim.items()}
        self._apart = {_place(tensor): name for tensor, name in apart.items()}
        self._own = {_place(t): name for name, t in own.items() if isinstance(t, nn.Parameter)}
        self._ids = {id(tensor) for tensor in own.values()}
        self._made: set[int] = set()
        self._opened: set[str] = set()
        self._before = victim

    def before(
        self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Iterable[Tensor]
    ) -> None:
        """Look at an operator that is about to run.

        Raises:
            TraceError: It would change a parameter, or computes with another network's tensor.
        """
        for tensor in tensors:
            place = _place(tensor)
            if (name := self._victim.get(place)) is not None:
                self._refuse(
                    f"computes with {name} of the network that it is a copy of, not with its own: {_CALLS}"
                )
            if (name := self._apart.get(place)) is not None:
                self._refuse(
                    f"computes with a tensor that shares memory with {name} but is not registered: {_VIEW}"
                )
            if isinstance(tensor, nn.Parameter) and place not in self._own and place not in self._made:
                self._refuse(f"computes with a parameter that is not registered in the network: {_LOOSE}")
        if op._schema.is_mutable:
            for index, argument in enumerate(op._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._writes(op, args[index] if index < len(args) else kwargs.get(argument.name))

    def _writes(self, op: Any, value: Any) -> None:
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and (name := self._own.get(_place(tensor))) is not None:
                self._refuse(f"changes its parameter {name} while it runs ({op}): {_WRITE}")

    def after(self, op: Any, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Look at what an operator returned."""
        places = {_place(tensor) for tensor in tensors}
        name = op.overloadpacket.__name__
        self._made |= {place for tensor in outputs if (place := _place(tensor)) not in places}
        if name == "lift_fresh":
            self._made |= places
        blank = name.startswith("new_") or name.endswith("_like")
        if not blank and any(self._depends(tensor) for tensor in tensors):
            for tensor in outputs:
                self.derived[id(tensor)] = weakref.ref(tensor), self._known.where
        if _DECIDES.intersection(op.tags) and (name != "index" or _masks(tensors)):
            self.looks(tensors)

    def opens(self, tensor: Tensor) -> None:
        """Note that what no operator shows may be written to a tensor."""
        if (name := self._own.get(_place(tensor))) is not None:
            self._opened.add(name)

    def after_all(self, own: Mapping[str, Tensor]) -> None:
        """See, after the run, that the copy still has its parameters, unchanged; else note a refusal."""
        for place, name in self._own.items():
            now = own.get(name)
            if now is None or _place(now) != place:
                self._note(
                    f"puts another tensor in the place of its parameter {name} while it runs: {_WRITE}"
                )
            elif name in self._opened and not _equal(now, self._before[name]):
                self._note(f"changes its parameter {name} while it runs: {_WRITE}")

    def looks(self, tensors: Iterable[Tensor]) -> None:
        """Note that the network looks at values."""
        self.decided |= any(not self._known.value(tensor).state for tensor in tensors)

    def left(self, outputs: set[int]) -> Left:
        """What was computed from weights or inputs and outlives the copy, apart from its outputs."""

        def alive() -> Left:
            derived = self.derived.items()
            return {key: made for key, made in derived if made[0]() is not None and key not in outputs}

        if alive():
            gc.collect()  # the copy's modules may refer to one another in a circle
        return alive()

    def _depends(self, tensor: Tensor) -> bool:
        if id(tensor) in self._ids or not self._known.value(tensor).state:
            return True
        reference, _ = self.derived.get(id(tensor), (None, ""))
        return reference is not None and reference() is tensor

    def _refuse(self, what: str) -> None:
        raise self._note(what)

    def _note(self, what: str) -> TraceError:
        self.refusal = self.refusal or TraceError(f"{self._known.where} {what}")
        return self.refusal


_CALLS = (
    "a function, a reference or a list outside the registered modules leads there (a patched forward does); "
    "take it off, or make it a method or a registered module"
)
_VIEW = "a copy of the network would not change it with its weights; make it a method, or take it out"
_LOOSE = "no state dict keeps it; register it (nn.ModuleList, nn.ParameterList), or make it a buffer"
_WRITE = "decrypted weights would not be those encrypted; keep state in buffers, or do it once, in training"


def _place(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # an array of NumPy has a storage of its own


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Bit for bit, whatever is no number included."""
    a, b = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (ours, theirs))
    return torch.equal(a, b)


def _masks(tensors: Iterable[Tensor]) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors)


class Reads(TorchFunctionMode):
    """Notices when Python code takes values out of tensors, which no operator shows."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS and args and isinstance(args[0], Tensor):
            self._watch.looks(args[:1])
            self._watch.opens(args[0])
        return func(*args, **(kwargs or {}))
