"""A network's structure: its tensors by name, and copies of it around other tensors."""

from __future__ import annotations

import copy
import enum
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from deepenc.errors import SiteError, TraceError
from deepenc.network.attention import adapt

State = Mapping[str, Tensor]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that no state dict keeps too; tied ones by each name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def fresh_tensors(tensors: State) -> dict[str, Tensor]:
    """Clones that share no memory with the originals; tied ones stay one tensor."""
    made: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor) if tensor.is_meta else tensor.detach().clone()
    return {name: made[id(tensor)] for name, tensor in tensors.items()}


def replace_tensors(model: nn.Module, tensors: State) -> nn.Module:
    """Copy a network's structure around other tensors, of any shapes; the given model is untouched.

    Args:
        model: The structure; its own tensors are not copied where others replace them.
        tensors: State-dict names to tensors; taken as they are, not cloned.

    Raises:
        SiteError: A tensor has no place in the model.
        TraceError: A module keeps a function that would go on calling the original.
    """
    return copy_around(model, tensors)[0]


def copy_around(model: nn.Module, tensors: State) -> tuple[nn.Module, dict[Tensor, str]]:
    """What `replace_tensors` returns, and the tensors of the copy that have come apart from named ones.

    Returns:
        The copy, and its tensors that are no parameters or buffers, while those that they are copies of
        share memory with one; each with the name of that one.
    """
    # Both names of a tied tensor map to one object, so that it stays tied.
    own = named_tensors(model)
    _refuse_closures(model)
    if strangers := sorted(set(tensors) - set(own)):
        raise SiteError(f"tensors {strangers[:5]} have no place in {type(model).__name__}")
    memo: dict[int, object] = {}
    for name, tensor in tensors.items():
        old = own[name]
        if isinstance(old, nn.Parameter):
            memo[id(old)] = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        else:
            memo[id(old)] = tensor.detach()
    result: nn.Module = _copy(model, memo)
    before = dict(model.named_modules())
    for path, module in result.named_modules():
        module.training = before[path].training  # a class that copies itself may forget it
        resize(module, before[path])
    named = {id(tensor) for tensor in own.values()}
    places = {tensor.untyped_storage()._cdata: name for name, tensor in own.items()}
    copied: Any = memo.get(id(memo), ())  # what `copy.deepcopy` has copied
    apart = {
        cast(Tensor, memo[id(old)]): places[old.untyped_storage()._cdata]
        for old in copied
        if isinstance(old, Tensor) and id(old) not in named
        if old.layout is torch.strided and old.untyped_storage()._cdata in places
    }
    return result, apart


def _refuse_closures(model: nn.Module) -> None:
    """Refuse functions that hold on to the network: no copy changes them, so that they call the original.

    Bound methods, and objects that hold modules, are copied with the network.
    """
    own: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules", "_compiled_call_impl"):
                continue
            if isinstance(value, FunctionType | partial | MethodType | list | tuple | dict) and value:
                own = own or {id(part) for part in (*model.modules(), *named_tensors(model).values())}
                if any(id(held) in own for held in _held(value, set(), False)):
                    raise TraceError(
                        f"{path or 'the network'} ({type(module).__name__}) keeps in {name!r} a function "
                        "that holds on to modules or tensors of this network, and that copies would go on "
                        "calling; take it off, or make it a method or a module"
                    )


def _held(value: Any, seen: set[int], inside: bool) -> Iterator[Any]:
    """What functions hold on to in their closures and defaults, in whatever containers they are."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY)
        for part in (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield from _held(part, seen, True)
    elif isinstance(value, dict | list | tuple | set):
        for part in (*value.values(),) if isinstance(value, dict) else value:
            yield from _held(part, seen, inside)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _held(part, seen, inside)
    elif isinstance(value, MethodType):
        yield from _held(value.__self__, seen, inside)
        yield from _held(value.__func__, seen, inside)
    elif isinstance(value, weakref.ref) and inside:
        yield from _held(value(), seen, True)
    elif inside:
        yield value


_EMPTY = CellType()
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, type, FunctionType)


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` does, several times faster for modules that leave copying to Python."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
        return value
    if type(value) in (dict, OrderedDict):
        made: Any = type(value)()
        memo[id(value)] = made
        for key, part in value.items():
            made[key] = _copy(part, memo)
        return made
    if isinstance(value, nn.Module) and copied_by_python(type(value)):
        made = object.__new__(type(value))
        memo[id(value)] = made
        parts = ((name, part) for name, part in vars(value).items() if name != "_compiled_call_impl")
        made.__dict__.update({name: _copy(part, memo) for name, part in parts})
        return made
    return copy.deepcopy(value, memo)


def copied_by_python(kind: type[nn.Module]) -> bool:
    """Whether a class of modules does nothing of its own when it is copied."""
    return (
        not any(hasattr(kind, name) for name in ("__deepcopy__", "__slots__", "__getnewargs__"))
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__setstate__ is nn.Module.__setstate__
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
    )


def resize(module: nn.Module, before: nn.Module) -> None:
    """Make a layer's declared sizes agree with its tensors.

    Args:
        module: The layer with its new tensors.
        before: The layer as it was, for what tensors alone do not tell (depthwise or grouped).
    """
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(before, nn.modules.conv._ConvNd):
        if before.groups == before.in_channels and before.groups > 1:  # depthwise: one group a channel
            module.groups = module.weight.shape[0] * before.groups // before.weight.shape[0]
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        sizes = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels = sizes
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for tensor in (module.weight, module.running_mean):
            if tensor is not None:
                module.num_features = tensor.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.MultiheadAttention):
        adapt(module)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        vars(module).update(zip(("nx", "nf"), cast(Tensor, module.weight).shape, strict=True))
