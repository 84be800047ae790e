"""What cannot be carried along is refused, with the name of the module or tensor and a remedy."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from deepenc.errors import TraceError
from deepenc.network.find import analyse, find_sites
from deepenc.network.tracing.admit import admit, tensors_in
from tests.network.small_networks import IMAGE, ROW, Answer, Case, convolutional, layers


def scripted_part() -> Case:
    model = convolutional()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[0] = torch.jit.script(model[0])
    return model, IMAGE


def traced() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(convolutional(), IMAGE), IMAGE


def quantised() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(convolutional(), {nn.Linear}, torch.qint8), IMAGE


def quantised_buffer() -> Case:
    model, x = layers()
    model.second.register_buffer("packed", torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8))
    return model, x


def with_weight(weight: Callable[[Tensor], Tensor]) -> Case:
    model, x = layers()
    model.second.weight = nn.Parameter(weight(model.second.weight.detach()))
    return model, x


def old_weight_norm() -> Case:
    model = convolutional()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[3])
    return model, IMAGE


def pruned() -> Case:
    model = convolutional()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model, IMAGE


def divided() -> Case:
    model = convolutional()
    model[6].to("meta")
    return model, IMAGE


def remembering() -> Case:
    def use(m: Any, x: Tensor) -> Tensor:
        m.seen = m.first(x)
        return m.last(m.second(m.seen))

    model, x = layers(use)
    model(x)
    return nn.Sequential(model), x


def in_inference_mode() -> Case:
    with torch.inference_mode():
        return layers()


class Subclass(Tensor):
    """As bitsandbytes, torchao and DTensor make them."""


class Unmindful(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Unmindful:
        return Unmindful(*(copy.deepcopy(module) for module in self))


class Single(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Single:
        return self


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        raise TypeError("there is only one of me")


def locked() -> Case:
    model, x = layers()
    model.second.lock = threading.Lock()
    return model, x


REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "a function": (lambda: (F.relu, ROW), "expected a network.*got a"),
    "a class": (lambda: (nn.Linear, ROW), "expected a network.*got Linear; pass an instance"),
    "scripted part": (scripted_part, r"^0 \(Recursive.* scripted or traced; pass the module"),
    "traced": (traced, r"^the network \(.* scripted or traced; pass the module"),
    "compiled": (
        lambda: (nn.Sequential(torch.compile(convolutional(), backend="eager")), IMAGE),
        r"^0 \(OptimizedModule\) is compiled; pass its _orig_mod",
    ),
    "wrapped": (lambda: (nn.DataParallel(convolutional()), IMAGE), r"\(DataParallel\).*pass its \.module"),
    "quantised": (quantised, r"^6 \(Linear\) is quantised.*as it was before"),
    "quantised buffer": (quantised_buffer, r"^second\.packed is quantised \(torch\.qint8\)"),
    "sparse": (lambda: with_weight(Tensor.to_sparse), r"^second\.weight has the layout .*to_dense"),
    "subclass": (
        lambda: with_weight(lambda w: w.as_subclass(Subclass)),
        r"^second\.weight is a Subclass",
    ),
    "lazy": (
        lambda: (nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 2)), ROW),
        r"^0\.weight .*run the network",
    ),
    "old weight norm": (old_weight_norm, r"^the weight of 3 \(Conv2d\).*remove_weight_norm"),
    "pruned": (pruned, r"^the weight of 0 \(Conv2d\).*prune\.remove"),
    "several devices": (divided, r"several devices \(0\.weight on cpu, 6\.weight on meta\)"),
    "an example elsewhere": (
        lambda: (convolutional(), IMAGE.to("meta")),
        "is on meta, the network on cpu",
    ),
    "a kept activation": (remembering, r"^0 \(Layers\) keeps in 'seen'.*detach"),
    "inference mode": (in_inference_mode, r"^first\.weight .*inference_mode.*no_grad"),
    "a copy without the memo": (
        lambda: (nn.Sequential(Unmindful(nn.Linear(3, 6), nn.Linear(6, 2))), ROW),
        r"^0 \(Unmindful\) cannot be copied: its copy does not take.*memo",
    ),
    "no copy": (lambda: (Single(nn.Linear(3, 6), nn.Linear(6, 2)), ROW), r"\(Single\) cannot be copied"),
    "a copy that raises": (
        lambda: (nn.Sequential(nn.Linear(3, 6), Uncopied(6, 2)), ROW),
        r"^1 \(Uncopied\) cannot be copied: TypeError: there is only one",
    ),
    "a lock": (locked, r"^second \(Linear\) cannot be copied: TypeError: cannot pickle"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, message = REFUSED[name]
    model, x = build()
    with pytest.raises(TraceError, match=message):
        admit(model, x)


def test_find_sites_asks_first() -> None:
    with pytest.raises(TraceError, match="pass its _orig_mod"):
        find_sites(torch.compile(convolutional(), backend="eager"), IMAGE)


def test_a_network_of_no_tensors_is_admitted() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    admit(model, IMAGE)
    assert analyse(model, IMAGE).sites == ()


def test_what_is_returned_is_found() -> None:
    a, b, c, d = torch.rand(4, 1)
    answer = Answer(a, [b, {"c": c}])  # type: ignore[arg-type]
    assert [float(t) for t in tensors_in((answer, 3, None, d))] == [float(t) for t in (a, b, c, d)]
    assert tree_leaves(answer) == [answer]  # else this test shows nothing
    with pytest.raises(TraceError, match="returns dict without a tensor"):
        tensors_in({"loss": 0.5})
