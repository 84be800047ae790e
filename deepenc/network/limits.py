"""How large a network may get that is made because a file says so."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from deepenc.errors import CheckpointError
from deepenc.network.calling import removed

_LABELS = frozenset({"num_labels", "num_classes", "classes"})
_NO_COUNTS = frozenset({"rope_theta", "seed"})


@dataclass(frozen=True)
class Limits:
    """What a network may have at most.

    Attributes:
        modules: Submodules, each counted where it is put into another.
        elements: Of a single parameter.
        labels: Classes among the arguments, whose names libraries list; and entries of any list or mapping.
        number: Any other integer among the arguments.
    """

    modules: int
    elements: int
    labels: int
    number: int

    @classmethod
    def of(cls, shapes: Iterable[Iterable[int]]) -> Self:
        """Limits that a network with tensors of these shapes keeps, or one of fewer channels.

        They are generous: a module may have no tensor, and an integer among the arguments may be no size.
        """
        known = [tuple(shape) for shape in shapes]
        return cls(
            modules=1000 + 50 * len(known),
            elements=2**20 + sum(map(math.prod, known)),
            labels=max((1000, *(size for shape in known for size in shape))),
            number=2**24,  # positions of the longest contexts; some libraries make lists of any other
        )

    def check(self, value: JsonValue, key: str = "") -> None:
        """See that no integer in some arguments is too large, and no list too long.

        Raises:
            CheckpointError: One is.
        """
        if isinstance(value, dict | list) and len(value) > self.labels:
            raise CheckpointError(_exceeded(f"its argument {key!r} has {len(value)} entries"))
        if isinstance(value, dict):
            for name, item in value.items():
                self.check(item, name)
        elif isinstance(value, list):
            for item in value:
                self.check(item, key)
        elif isinstance(value, int) and key not in _NO_COUNTS and abs(value) > self._most(key):
            raise CheckpointError(_exceeded(f"its argument {key!r} is {value}"))

    def _most(self, key: str) -> int:
        return self.labels if key in _LABELS else self.number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, stop whatever makes a network in this thread as soon as it exceeds a limit.

        Raises:
            CheckpointError: It does.
        """
        left, thread = self.modules, threading.get_ident()

        def module(*_: object) -> None:
            nonlocal left
            left -= threading.get_ident() == thread
            if left < 0:
                raise CheckpointError(_exceeded(f"it has more than {self.modules} modules"))

        def parameter(_: nn.Module, name: str, found: Tensor | None) -> None:
            if (
                found is None
                or isinstance(found, nn.UninitializedParameter)
                or threading.get_ident() != thread
            ):
                return
            if found.numel() > self.elements:
                raise CheckpointError(_exceeded(f"its parameter {name!r} is {tuple(found.shape)}"))

        hooks = [register_module_module_registration_hook(module)]
        with removed(hooks):
            hooks.append(register_module_parameter_registration_hook(parameter))
            yield


def _exceeded(what: str) -> str:
    return (
        f"the file names a network that is larger than its tensors allow: {what}; it was altered, or is of "
        "another architecture"
    )
