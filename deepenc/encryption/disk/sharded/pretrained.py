"""The structure of a Hugging Face style checkpoint's network, from its config.json alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from deepenc.encryption.disk.sharded.shards import Entry, read_json
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import CheckpointError
from deepenc.network.factory import Factory
from deepenc.network.limits import Limits

CONFIG: Final = "config.json"

_WRAPPERS: Final = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "state_dict.": "a training script",
    "model.": "a training script",
}
_ORIGIN = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map"}


def structure_of(folder: Path, entries: Mapping[str, Entry]) -> tuple[nn.Module, Factory]:
    """The network that a checkpoint is of, on the meta device, and how it is made again.

    It is the class that the configuration names or, where the names of the tensors say so, the network
    inside that class, without its head. Only transformers' own code is used, none that came with the
    checkpoint.

    Args:
        folder: With ``config.json``.
        entries: The checkpoint's tensors.

    Raises:
        CheckpointError: There is no configuration, or the tensors are not those of its network.
        ConfigError: transformers is not installed (``pip install deepenc[text]``) or does not know the
            network.
    """
    config = read_json(folder / CONFIG)
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        raise CheckpointError(
            f"{folder / CONFIG} names no class of transformers under 'architectures'; add it, for example "
            '"architectures": ["LlamaForCausalLM"]'
        )
    arguments = {name: value for name, value in config.items() if name not in _ORIGIN}
    limits = Limits.of(entry.shape for entry in entries.values())
    first = _built(str(classes[0]), arguments, limits)
    inner = getattr(first, "base_model", first)
    best = max((first, inner), key=lambda network: len(set(network.state_dict()) & set(entries)))
    if set(best.state_dict()).isdisjoint(entries):
        raise CheckpointError(
            f"none of the tensors in {folder} is one of {classes[0]}'s, such as "
            f"{next(iter(first.state_dict()), 'none')!r}; {_wrapped(entries, first.state_dict())}"
        )
    network = first if best is first else _built(type(best).__name__, arguments, limits)
    factory = Factory.of_transformer(network)
    # Tracing follows the plain implementation; the widths it finds hold for the others, too.
    network.config._attn_implementation = "eager"
    network.config.use_cache = False
    return network, factory


def check_complete(network: nn.Module, stored: Mapping[str, Tensor], folder: Path) -> set[str]:
    """See that a network has the tensors of a checkpoint, no more and no fewer, so that it can be rebuilt.

    Older libraries stored masks and the like that networks make by themselves now; they may be there, and so
    may empty tensors and single numbers.

    Args:
        network: From `structure_of`.
        stored: The checkpoint's tensors under all their names, on the meta device.
        folder: For messages.

    Returns:
        The names of what else may be there, and is.

    Raises:
        CheckpointError: It has not.
    """
    own, made = tensors_of(network), dict(network.named_buffers())
    ignored = [
        re.compile(text) for text in getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    beside = {
        name
        for name in stored.keys() - own.keys()
        if name in made or stored[name].numel() < 2 or any(pattern.search(name) for pattern in ignored)
    }
    for name, tensor in stored.items():
        if name in own and own[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name!r} is {tuple(tensor.shape)}, by {CONFIG} it is {tuple(own[name].shape)}; give "
                "the configuration of this very checkpoint"
            )
    extra, missing = sorted(stored.keys() - own.keys() - beside), sorted(own.keys() - stored.keys())
    if extra or missing:
        faults = [f"has {len(extra)} tensors that it has not, such as {extra[:2]}"] if extra else []
        faults += [f"lacks {len(missing)} of its tensors, such as {missing[:2]}"] if missing else []
        raise CheckpointError(
            f"{folder} is not what {CONFIG} says, a {type(network).__name__}: it {', and '.join(faults)}. "
            "Give the configuration of this very checkpoint; if it was written by an older library, load it "
            "with transformers and write it again with save_pretrained"
        )
    return beside


def _wrapped(names: Collection[str], own: Collection[str]) -> str:
    """What to do about names that fit only without what a wrapper put before them."""
    for prefix, wrapper in _WRAPPERS.items():
        if any(name.startswith(prefix) and name.removeprefix(prefix) in own for name in names):
            return f"their names have the prefix {prefix!r} of {wrapper}: save the network inside it"
    return f"the checkpoint is of another network than {CONFIG}"


def _built(name: str, arguments: dict[str, Any], limits: Limits) -> Any:
    spec = {"library": "transformers", "name": name, "arguments": arguments}
    return Factory.of(spec).build("meta", limits=limits)


def examples_of(network: Any) -> list[dict[str, Tensor]]:
    """Example inputs of a network of transformers, on the meta device; one of them can be traced."""
    if getattr(network, "main_input_name", "input_ids") == "pixel_values":
        config = network.config
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return [{"pixel_values": torch.zeros(shape, device="meta")}]
    words = torch.zeros(1, 8, dtype=torch.long, device="meta")
    example = {"input_ids": words}
    if getattr(network.config, "is_encoder_decoder", False):
        example["decoder_input_ids"] = words
    # Without values a network cannot tell whether a mask masks: some ask only if there is one, some if not.
    return [example, example | {"attention_mask": torch.ones_like(words)}]
