"""What a network does on an example, and how closely another must do the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepenc.errors import TraceError
from deepenc.network.calling import call, fresh
from deepenc.network.guard import foreign, seeded
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.tracing.admit import tensors_in
from deepenc.network.tracing.dry import DryRun
from deepenc.network.tracing.watch import Left

_CALCULABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
_FAINT = 0.01
"""Typical gain below which a tensor hardly shows in the outputs, as where a branch is scaled by 1e-6."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What a network does on an example.

    Attributes:
        outputs: All tensors that it returns.
        constants: The plain numbers by which it multiplies, in order. A network that scales by its own
            width has others when it is widened, which values may hide, and on the meta device do.
        movements: For each output by how much each entry moves when the weights change; None where none
            does, or where that is not known.
    """

    outputs: list[Tensor]
    constants: list[float]
    movements: tuple[Tensor | None, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example: Any, left: Left | None = None) -> Self:
        """Run a network, which may change by it, on an example, which does not.

        Args:
            model: The network.
            example: A tensor, a tuple or dict of them, or `Arguments`.
            left: What an earlier copy has left outside of the network; see `Traced`.
        """
        log = _Constants(left or {})
        seeded()
        with torch.no_grad(), log:
            outputs = tensors_in(call(model, fresh(example)))
        if log.refusal is not None:
            raise log.refusal
        return cls(outputs, log.found)

    @property
    def tells(self) -> bool:
        """Whether any output depends on the weights."""
        return any(movement is not None for movement in self.movements)

    def moved(self, others: Sequence[Tensor]) -> Self:
        """The same with `movements`, from what the same network returns with other weights."""
        return replace(self, movements=tuple(map(_movement, self.outputs, others)))

    def agrees(self, ours: Sequence[Tensor]) -> bool:
        """Whether outputs are these up to the rounding of sums in another order; on meta, always.

        An entry may be off by a small part of how far it, or the median entry, moves when weights change, and
        by its own rounding. So a mask of -1e9 beside the logits, or a large offset, hides nothing.
        """
        movements = self.movements or (None,) * len(self.outputs)
        triples = zip(ours, self.outputs, movements, strict=True)
        return all(a.is_meta or _close(a, b, movement) for a, b, movement in triples)


def reference(model: nn.Module, example: Any) -> Expected:
    """What a network does, and on what scale; the network is untouched."""
    with foreign(f"{type(model).__name__} does not run on the example"):
        expected = Expected.of(pristine(model), example)
        return expected.moved(Expected.of(telling(model, 2), example).outputs)


def pristine(model: nn.Module) -> nn.Module:
    """A copy around the same parameters and clones of the buffers: state that a run changes is its own."""
    return replace_tensors(model, shared(model))


def shared(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `pristine`."""
    tensors = named_tensors(model)
    clones: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, nn.Parameter):
            tensors[name] = clones.setdefault(id(tensor), tensor.clone())
    return tensors


def telling(model: nn.Module, seed: int = 1) -> nn.Module:
    """A copy with other values that hide nothing: each row scaled, faint tensors louder, zeros random.

    A head is often initialised to zero, the last layer of a branch scaled by 1e-6; what is wrong before
    them would hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = named_tensors(model)
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in made:
            made[id(tensor)] = _louder(name, tensor.detach(), isinstance(tensor, nn.Parameter), generator)
    return replace_tensors(model, {name: made[id(tensor)] for name, tensor in tensors.items()})


def _louder(name: str, tensor: Tensor, learned: bool, generator: torch.Generator) -> Tensor:
    if tensor.is_meta or tensor.dtype not in _CALCULABLE or not tensor.numel():
        return tensor.clone()
    rows = tensor.shape[0] if tensor.dim() else 1
    gain = float(torch.linalg.vector_norm(tensor)) / math.sqrt(rows)
    if gain == 0 and learned:
        return (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor)
    factor = 0.1 / gain if 0 < gain < _FAINT and not name.rpartition(".")[2].startswith("running_") else 1.0
    if not learned:
        return tensor * factor if factor != 1.0 else tensor.clone()
    factors = (torch.rand(rows, generator=generator, dtype=torch.float64) * 0.6 + 0.7) * factor
    shape = [rows] + [1] * (tensor.dim() - 1) if tensor.dim() else []
    kind = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return tensor * factors.to(tensor.device, kind).view(shape)


def _movement(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """How far each entry moves, 0 where it is not finite; None if none moves."""
    if ours.is_meta or not (ours.is_floating_point() or ours.is_complex()):
        return None
    if ours.shape != theirs.shape:
        theirs = torch.zeros_like(ours)  # values decide how much is returned
    finite = ours.isfinite() & theirs.isfinite()
    distance = (ours - theirs).abs().where(finite, 0).double()
    moving = distance > 4 * torch.finfo(ours.dtype).eps * ours.abs().where(finite, 0)
    return distance.where(moving, 0) if bool(moving.any()) else None


def _close(ours: Tensor, theirs: Tensor, movement: Tensor | None) -> bool:
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return bool(torch.equal(ours, theirs))
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return False
    a, b = ours[~finite], theirs[~finite]
    if not bool(((a == b) | (a.isnan() & b.isnan())).all()):
        return False
    eps = torch.finfo(theirs.dtype).eps
    room = 4 * eps * theirs[finite].abs().double()
    if movement is not None:
        near = eps**0.5 if eps < 1e-5 else 4 * eps**0.5
        room += near * movement[finite].clamp_min(float(movement[movement > 0].median()))
    return bool(((ours[finite] - theirs[finite]).abs() <= room).all())


class _Constants(DryRun):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Collects the plain numbers by which a network multiplies."""

    def __init__(self, left: Left) -> None:
        super().__init__()
        self.found: list[float] = []
        self.refusal: TraceError | None = None
        self._left = left

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (result := self.decomposed(op, args, kwargs)) is not NotImplemented:
            return result
        name = op.overloadpacket.__name__
        given = [*args, *kwargs.values()]
        if self._left:
            self._look(given)
        factors = name.removesuffix("_") in {"mul", "div"}
        if name.startswith("_scaled_dot_product"):
            given = [kwargs.get("scale") or args[0].shape[-1] ** -0.5]
        self.found += [x for x in given if type(x) is float or (factors and type(x) is int)]
        if factors and any(isinstance(x, Tensor) and x.is_meta for x in given):
            self.found += [float(x) for x in given if isinstance(x, Tensor) and not (x.is_meta or x.dim())]
        return self.run(op, args, kwargs)

    def _look(self, given: Sequence[Any]) -> None:
        for value in given:
            for tensor in value if isinstance(value, list | tuple) else (value,):
                made, where = self._left.get(id(tensor), (None, ""))
                if made is not None and made() is tensor:
                    self.refusal = self.refusal or TraceError(
                        f"{where} keeps what it computes outside of the network (in a class, a module's "
                        "variable, a closure or a cache), where copies with other weights find it; keep "
                        "it in an attribute of the module, or compute it each time"
                    )
                    raise self.refusal
