"""What may be traced: refuse, by name and with a remedy, networks whose copies would not be exact.

Everything here is decided before the network runs. What can be carried along without being widened is
admitted: parametrizations, integer and complex tensors, hooks, frozen parameters, any precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from deepenc.errors import TraceError
from deepenc.network.structure import copied_by_python, named_tensors, replace_tensors

# By name: importing these would cost more time than tracing takes, or need what is not installed.
_CLASSES = {
    "torch.jit._script.ScriptModule": ("is scripted or traced", "pass the module that it was made of"),
    "torch._dynamo.eval_frame.OptimizedModule": ("is compiled", "pass its _orig_mod and compile afterwards"),
    "torch.nn.parallel.data_parallel.DataParallel": ("copies a network to devices", "pass its .module"),
    "torch.nn.parallel.distributed.DistributedDataParallel": (
        "copies a network to devices",
        "pass its .module",
    ),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "holds shards of a network",
        "gather its full state dict into an unwrapped network",
    ),
    "torch.nn.utils.weight_norm.WeightNorm": (
        "is recomputed by an old-style weight norm",
        "call torch.nn.utils.remove_weight_norm, or use torch.nn.utils.parametrizations.weight_norm",
    ),
    "torch.nn.utils.prune.BasePruningMethod": ("is recomputed by a mask", "call torch.nn.utils.prune.remove"),
}
_QUANTISED = "pass the network as it was before, and quantise the encrypted one"


def admit(model: Any, example: Any) -> None:
    """Refuse a network that cannot be copied around other tensors, or an example that is elsewhere.

    Args:
        model: Any network; untouched, not run.
        example: Its example input.

    Raises:
        TraceError: It is no network, or one of its modules or tensors, which is named, cannot be carried
            along: scripted, compiled, wrapped, quantised, sparse, lazy, of a tensor subclass, made in
            inference mode, on several devices, or not to be copied.
    """
    admit_kind(model)
    for path, module in model.named_modules():
        _admit_module(path, module)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full = f"{path}.{name}" if path else name
                _admit_tensor(full, tensor)
                tensors[full] = tensor
    _admit_devices(tensors, example)
    _admit_copies(model)


def admit_kind(model: Any) -> None:
    """Refuse what is no network; raises TraceError."""
    if not isinstance(model, nn.Module):
        got = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise TraceError(f"expected a network, a torch.nn.Module, got {got}; pass an instance of one")


def _admit_module(path: str, module: nn.Module) -> None:
    where = f"{path or 'the network'} ({type(module).__name__})"
    _admit_class(where, module)
    if type(module).__module__.startswith("torch.") and ".quantized." in type(module).__module__:
        raise TraceError(f"{where} is quantised, its weights are packed; {_QUANTISED}")
    for hook in module._forward_pre_hooks.values():
        name = getattr(hook, "name", getattr(hook, "_tensor_name", ""))
        _admit_class(f"the {name} of {where}", hook)
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise TraceError(
                f"{where} keeps in {name!r} a tensor that autograd computed, which cannot be copied; "
                "detach it, or set it to None"
            )


def _admit_class(where: str, thing: object) -> None:
    for base in type(thing).__mro__:
        if refusal := _CLASSES.get(f"{base.__module__}.{base.__qualname__}"):
            raise TraceError(f"{where} {refusal[0]}; {refusal[1]}")


def _admit_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise TraceError(f"{name} is not initialised yet; run the network once on the example")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise TraceError(
            f"{name} is a {type(tensor).__name__}, a tensor subclass, whose entries cannot be moved singly; "
            "pass the network with plain tensors (dequantised, gathered to one device)"
        )
    if tensor.is_quantized:
        raise TraceError(f"{name} is quantised ({tensor.dtype}); {_QUANTISED}")
    if tensor.layout is not torch.strided:
        raise TraceError(f"{name} has the layout {tensor.layout}; make it dense by .to_dense()")
    if tensor.is_inference():
        raise TraceError(
            f"{name} was made under torch.inference_mode(); make or load the network outside of it, or use "
            "torch.no_grad()"
        )


def _admit_devices(tensors: Mapping[str, Tensor], example: Any) -> None:
    first: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in first.items())
        raise TraceError(f"the network is on several devices ({places}); move it to one")
    for leaf in tree_leaves(example):
        if isinstance(leaf, Tensor) and first and leaf.device not in first:
            (device,) = first
            raise TraceError(
                f"the example is on {leaf.device}, the network on {device}; move one to the other's"
            )


def _admit_copies(model: nn.Module) -> None:
    """See that a copy of the network's structure takes other tensors, as every step from here on needs."""
    failure = _failure_to_copy(model)
    if failure is None:
        return
    for path, module in reversed(list(model.named_modules())):  # the innermost first
        if reason := _failure_to_copy(module):
            raise TraceError(
                f"{path or 'the network'} ({type(module).__name__}) cannot be copied: {reason}; give it a "
                "__deepcopy__ that passes its memo on, or take out what hinders it"
            )
    raise TraceError(f"the network ({type(model).__name__}) cannot be copied: {failure}")


def _failure_to_copy(module: nn.Module) -> str | None:
    own = named_tensors(module)
    marks = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    try:
        copied = replace_tensors(module, marks)
        found = named_tensors(copied)
    except TraceError:
        raise
    except Exception as error:  # user code: __deepcopy__, __reduce__, __getstate__ may raise anything
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if found.keys() != own.keys():
        return f"its copy has other tensors: {sorted(found.keys() ^ own.keys())[:5]}"
    places = {tensor.untyped_storage()._cdata for tensor in marks.values()}
    for name, tensor in found.items():
        if tensor.untyped_storage()._cdata not in places:
            return f"its copy does not take another tensor for {name!r}"
    twins = dict(copied.named_modules())
    for path, part in module.named_modules():
        if not copied_by_python(type(part)) and (lost := _lost(vars(part), vars(twins[path]))):
            return f"its copy has another {lost!r} in {path}" if path else f"its copy has another {lost!r}"
    return None


def _lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """The first plain attribute, or kind of hooks, that a copy does not have as it was."""
    for name, value in before.items():
        other = after.get(name)
        if name.endswith("_hooks"):
            if len(value or ()) != len(other or ()):
                return name
        elif _differs(value, other):
            return name
    return None


def _differs(value: Any, other: Any) -> bool:
    """Whether plain values, tensors or containers of them are not the same."""
    if isinstance(value, bool | int | float | str):
        return bool(value != other and value == value)
    if isinstance(value, Tensor):
        return not isinstance(other, Tensor) or not (other.is_meta or torch.equal(value, other))
    if type(value) in (dict, list, tuple):
        if type(other) is not type(value) or len(other) != len(value):
            return True
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        try:
            return any(_differs(value[key], other[key]) for key in keys)
        except KeyError:
            return True
    return False


def tensors_in(returned: Any) -> list[Tensor]:
    """All tensors in what a network returned, those in dataclasses and mappings of any type included.

    Raises:
        TraceError: There is none, so that nothing could be compared.
    """
    found = list(_opened(returned))
    if not found:
        raise TraceError(
            f"the network returns {type(returned).__name__} without a tensor in it, so that nothing can be "
            "compared; let it return tensors, or tuples, lists, dicts or dataclasses of them"
        )
    return found


def _opened(value: Any) -> Iterable[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _opened(dict(leaf))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _opened([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
