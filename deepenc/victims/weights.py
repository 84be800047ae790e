"""Weights in a file: tensors by name, as they were saved or inside what a wrapper put around them."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.network.guard import first_line
from deepenc.victims.data.images import expect_file

log = logging.getLogger(__name__)

_POINTER = b"version https://git-lfs"
_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
"""How the entry that holds the weights is mostly called where a file holds more; the first that there is."""
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch's own wrappers put into the names of the modules inside a network."""


def load_into(network: nn.Module, path: Path, who: str) -> None:
    """Read weights into a network.

    Of tied tensors the file may have one; buffers that the network makes itself may be in it, and the numbers
    of batches that BatchNorm counts may be missing, as old files have none. Names may begin with that under
    which a wrapper keeps the network (``module.`` of ``DataParallel``).

    Args:
        network: Receives the weights.
        path: The file.
        who: The network, for messages.

    Raises:
        VictimError: The file does not hold weights, or those of another network.
    """
    own = network.state_dict()
    state = _inner(read_state(path), own, path)
    filled = {own[name].data_ptr() for name in own.keys() & state.keys()}
    missing = (name for name in own if name not in state and not name.endswith("num_batches_tracked"))
    wrong = [name for name in missing if own[name].data_ptr() not in filled]
    made = dict(network.named_buffers())  # some libraries kept buffers in files that they now make themselves
    wrong += [n for n, tensor in state.items() if not (_alike(tensor, own[n]) if n in own else n in made)]
    if wrong:
        raise VictimError(
            f"{path} does not fit {who}: {len(wrong)} tensors differ, first {sorted(wrong)[:3]}; give the "
            "weights of that network, and what it was made with (`classes`, `config`, a factory's arguments)"
        )
    network.load_state_dict(state, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or one of torch's; code in it is not run.

    Where the file holds more, such as ``{"state_dict": ..., "epoch": 3}``, the weights in it.

    Raises:
        VictimError: It is none.
    """
    expect_file(path, "a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(len(_POINTER))
        if head == _POINTER:
            raise VictimError(
                f"{path} is a pointer of Git LFS, not the weights themselves; fetch them: git lfs pull"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".safetensors":
                found: Any = load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
    except VictimError:
        raise
    except PermissionError as error:
        raise VictimError(f"cannot read {path} ({error.strerror}); make it readable") from error
    except Exception as error:  # torch's restricted unpickler raises whatever damaged bytes lead it to
        raise VictimError(f"{path} is not a file of weights: {_reason(error)}") from error
    state = _state_in(found, path)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise VictimError(
                f"{path}: {name!r} is sparse, quantised or without values; save plain tensors, of "
                "float32 for example"
            )
    return state


def _reason(error: Exception) -> str:
    """What is wrong with a file, without torch's advice to trust it."""
    said = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", said):
        what = found[1] or found[2]
        return f"it holds a Python object ({what}), which could run code; save the network's `state_dict()`"
    if "TorchScript" in said:
        return "it is a TorchScript archive; save the network's `state_dict()` instead"
    if "weights_only" in said or not said.strip():
        return f"it is damaged, or something else ({type(error).__name__}); torch.save a `state_dict()`"
    return f"it is damaged, or something else ({type(error).__name__}: {first_line(error)})"


def _state_in(found: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name that a file's content is, or has as an entry."""
    if _is_state(found):
        return dict(found)
    inside = (
        {key: value for key, value in found.items() if _has_state(value)}
        if isinstance(found, Mapping)
        else {}
    )
    key = next(
        (key for key in _KEYS if key in inside), next(iter(inside), None) if len(inside) == 1 else None
    )
    if key is not None:
        log.info("%s: the weights are its entry %r", path, key)
        return _state_in(inside[key], path)
    if inside:
        raise VictimError(
            f"{path} holds several sets of weights: {', '.join(map(repr, inside))}; save the one to use alone"
        )
    if isinstance(found, Mapping):
        odd = [
            f"{key!r} ({type(value).__name__})"
            for key, value in found.items()
            if not isinstance(value, Tensor)
        ]
        got = f"a mapping with {', '.join(odd[:3])}" if odd else "an empty mapping"
    else:
        got = type(found).__name__
    raise VictimError(f"{path} is not a file of weights: expected a state dict, got {got}")


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.is_complex() == other.is_complex()


def _is_state(value: Any) -> bool:
    return _named(value) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _has_state(value: Any) -> bool:
    return _is_state(value) or (_named(value) and any(_is_state(item) for item in value.values()))


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _inner(state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by the network's own names, where a wrapper changed them."""
    plain = state
    if not any(map(_WRAPPERS.search, own)):
        plain = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if own.keys() & plain.keys():
        return plain
    found = Counter(
        prefix for name in plain for prefix in _prefixes(name) if name.removeprefix(prefix) in own
    )
    best = found.most_common(2)
    if not best or (len(best) == 2 and best[0][1] == best[1][1]):
        return state
    prefix = best[0][0]
    inner = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    log.info("%s: read without the prefix %r", path, prefix)
    if rest := [name for name in plain if not name.startswith(prefix)]:
        log.warning("%s: without %d tensors that begin otherwise, such as %s", path, len(rest), rest[:3])
    return inner


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) + "." for count in range(1, len(parts)))
