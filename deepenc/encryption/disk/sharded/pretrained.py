"""The structure of a Hugging Face style checkpoint's network, from its config.json alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from deepenc.encryption.disk.sharded.shards import read_json
from deepenc.errors import CheckpointError
from deepenc.network.factory import Factory

CONFIG: Final = "config.json"

_ORIGIN = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map"}


def structure_of(folder: Path, names: Collection[str]) -> tuple[nn.Module, Factory]:
    """The network that a checkpoint is of, on the meta device, and how it is made again.

    It is the class that the configuration names or, where the names of the tensors say so, the network
    inside that class, without its head. Only transformers' own code is used, none that came with the
    checkpoint.

    Args:
        folder: With ``config.json``.
        names: Of the checkpoint's tensors.

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
    first = _built(str(classes[0]), arguments)
    inner = getattr(first, "base_model", first)
    best = max((first, inner), key=lambda network: len(set(network.state_dict()) & set(names)))
    if set(best.state_dict()).isdisjoint(names):
        raise CheckpointError(
            f"none of the tensors in {folder} is one of {classes[0]}'s, such as "
            f"{next(iter(first.state_dict()), 'none')!r}; the checkpoint is of another network than {CONFIG}"
        )
    network = first if best is first else _built(type(best).__name__, arguments)
    factory = Factory.of_transformer(network)
    # Tracing follows the plain implementation; the widths it finds hold for the others, too.
    network.config._attn_implementation = "eager"
    network.config.use_cache = False
    return network, factory


def _built(name: str, arguments: dict[str, Any]) -> Any:
    spec = {"library": "transformers", "name": name, "arguments": arguments}
    return Factory.of(spec).build("meta")


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
