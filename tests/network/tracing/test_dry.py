"""Remembered shapes are the shapes that torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepenc.network.tracing.dry import DryRun

Log = list[tuple[str, list[tuple[Any, ...]]]]


def described(result: Any) -> list[tuple[Any, ...]]:
    return [
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type)
        for leaf in tree_leaves(result)
        if isinstance(leaf, Tensor)
    ]


class Plain(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Writes down what each operator returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: Log = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        self.log.append((str(op), described(result)))
        return result


class Dry(DryRun):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Writes down what each operator returns, and counts those that were not run."""

    def __init__(self) -> None:
        super().__init__()
        self.log: Log = []
        self.saved = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with Plain() as counter:
            result = self.run(op, args, kwargs or {})
        self.saved += not any(name == str(op) for name, _ in counter.log)
        self.log.append((str(op), described(result)))
        return result


def both(model: nn.Module, x: Tensor) -> tuple[Plain, Dry]:
    with torch.no_grad():
        with Plain() as plain:
            model(x)
        with Dry() as dry:
            model(x)
    return plain, dry


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_result_is_as_torch_has_it(name: str, layout: torch.memory_format) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.empty(2, 3, 224, 224).to(memory_format=layout)
    plain, dry = both(model, x)
    assert len(plain.log) > 50
    assert dry.log == plain.log
    assert dry.saved > len(plain.log) / 4  # it is not just run


def test_tensors_with_values_are_never_replaced() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6)) for _ in range(4)))
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = block(x)
        with Dry() as dry:
            got = block(x)
    assert dry.saved == 0 and torch.equal(got, expected)


def test_one_tensor_with_values_is_enough() -> None:
    meta, number = torch.empty(3, device="meta"), torch.tensor(2.0)
    with Dry() as dry:
        for _ in range(3):
            assert (meta * number).is_meta
    assert dry.saved == 0


def test_constants_have_their_values() -> None:
    with Dry() as dry:
        first, second = torch.arange(4), torch.arange(4)
        ones = [torch.ones(2, device="cpu") for _ in range(2)]
    assert dry.saved == 0
    assert first.tolist() == second.tolist() == [0, 1, 2, 3]
    assert first is not second and all(one.tolist() == [1.0, 1.0] for one in ones)


def test_results_in_place_are_the_tensors_given() -> None:
    x = torch.empty(2, 3, device="meta")
    with Dry() as dry:
        for _ in range(3):
            assert x.add_(1) is x
            assert x.relu_() is x
            other = torch.empty(2, 3, device="meta")
            torch.add(x, x, out=other)
    assert dry.saved == 2  # the second and the third torch.empty


def test_views_share_their_memory() -> None:
    x = torch.empty(4, 6, device="meta")
    views = [
        lambda: x.view(6, 4),
        lambda: x.t(),
        lambda: x[1:3],
        lambda: x.transpose(0, 1),
        lambda: x.expand(2, 4, 6),
        lambda: x.split(2)[1],
        lambda: x.unsqueeze(0),
    ]
    with Dry():
        for _ in range(3):
            for view in views:
                made = view()
                assert made._base is x or made.untyped_storage()._cdata == x.untyped_storage()._cdata
        offsets = [x[start : start + 2].storage_offset() for start in (0, 1, 2, 1)]
    assert offsets == [0, 6, 12, 6]


def test_what_differs_is_told_apart() -> None:
    """Shapes, strides, types, plain arguments, and 1 from 1.0 and True."""
    a = torch.empty(4, 4, device="meta")
    made = [
        lambda: a + 1,
        lambda: a.to(torch.long) + 1,
        lambda: a.to(torch.long) + 1.0,
        lambda: a.to(torch.bool) + 1,
        lambda: a.to(torch.bool) + True,
        lambda: a.t() + 1,
        lambda: a.sum(0),
        lambda: a.sum(1, keepdim=True),
        lambda: a[:2].sum(0),
        lambda: a.to(torch.float64).sum(0),
        lambda: torch.cat([a, a], 0),
        lambda: torch.cat([a, a], 1),
        lambda: torch.cat([a, a, a], 1),
        lambda: a.sum(0, dtype=torch.float64),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3, device="meta", dtype=torch.int8),
        lambda: a.topk(2).values,
        lambda: a.topk(3).indices,
    ]
    expected = [described(make()) for make in made]
    with Dry() as dry:
        for _ in range(2):
            assert [described(make()) for make in made] == expected
    assert dry.saved >= len(made) - 2


def test_several_results_stay_several() -> None:
    a = torch.empty(4, 6, device="meta")
    with Dry() as dry:
        pairs = [a.sort(dim=1) for _ in range(2)]
        parts = [torch.ops.aten.native_layer_norm(a, [6], None, None, 1e-5) for _ in range(2)]
    assert dry.saved == 2
    assert described(pairs[0]) == described(pairs[1]) and len(pairs[1]) == 2
    assert [p.dtype for p in pairs[1]] == [torch.float32, torch.int64]
    assert described(parts[0]) == described(parts[1]) and len(parts[1]) == 3
