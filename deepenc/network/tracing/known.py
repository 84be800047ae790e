"""What is known of the tensors of a running network: what the rules of operators ask and answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from deepenc.network.tracing.axes import Axes, Axis


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a tensor.

    Attributes:
        axes: One axis a dimension.
        state: Whether it depends on parameters, buffers and constants only, not on the input. A product of
            two such is followed as what depends on the input is: it may be a query that was learned.
        scores: The channels over which activations were multiplied with one another to make it, as queries
            with keys; what attention then weighs by it belongs to the same heads.
    """

    axes: tuple[Axis, ...]
    state: bool
    scores: Axis = None


class Known:
    """The axes of all tensors that a run has met.

    Args:
        names: ``id`` of each parameter and buffer to its name.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.axes = Axes()
        self.path: list[str] = []
        """Paths of the modules that run, the innermost last."""
        self.scores: Axis = None
        """Of the results of the operator at hand; a rule may change it."""
        self.state = False
        """Of the results of the operator at hand; a rule may change it."""
        self._names = names
        self._written: dict[int, StorageWeakRef] = {}
        self._values = WeakTensorKeyDictionary()

    @property
    def where(self) -> str:
        """The innermost module that runs."""
        return self.path[-1] if self.path and self.path[-1] else "the network"

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a tensor not seen before is a parameter or a constant."""
        known: Value | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        if known is None:
            name = self._names.get(id(tensor))
            if name is not None and tensor.is_floating_point():
                known = Value(
                    tuple(self.axes.own(name, d, size) for d, size in enumerate(tensor.shape)), True
                )
            else:
                known = Value((None,) * tensor.dim(), True)
            self._values[tensor] = known
        if known.state and self._written:
            storage = self._written.get(tensor.untyped_storage()._cdata)
            if storage is not None and not storage.expired():  # type: ignore[no-untyped-call]
                return replace(known, state=False)
        return known

    def learn(self, tensor: Tensor, value: Value) -> None:
        """Note what is known of a tensor that an operator returned."""
        self._values[tensor] = value

    def write(self, tensor: Tensor) -> None:
        """Note that what depends on the input was written into a tensor; its views share it."""
        storage = tensor.untyped_storage()
        self._written[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def enter(self, tensor: Tensor) -> None:
        """Declare an input of the network."""
        self._values[tensor] = Value((None,) * tensor.dim(), False)
