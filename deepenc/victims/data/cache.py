"""Trained weights on disk: safetensors with a checksum, written whole or not at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from deepenc.errors import VictimError
from deepenc.files import write_whole
from deepenc.victims.data.splits import checksum

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where trained and converted victims are kept: ``$DEEPENC_CACHE``, or a folder of the user's cache."""
    if own := os.environ.get("DEEPENC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepenc"


def trained(path: Path, model: nn.Module, train: Callable[[nn.Module], None]) -> nn.Module:
    """Load a network's weights from a file, or train them first where the file is missing or damaged.

    Two processes that train at once end with the weights of the same file.

    Args:
        path: The file; its folder is created where missing.
        model: Receives the weights; left in eval mode.
        train: Trains the network in place; called at most once.

    Raises:
        VictimError: The folder cannot be written to.
    """
    state = recall(path, model)
    if state is None:
        train(model)
        try:
            if recall(path, model) is None:
                keep(path, model.state_dict())
        except OSError as error:
            raise VictimError(
                f"cannot keep trained weights at {path}: {error}; free space there, "
                "or choose another cache folder"
            ) from error
        state = recall(path, model) or model.state_dict()
    model.load_state_dict(state)
    return model.eval()


def keep(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, whole or not at all.

    Raises:
        OSError: The folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(path, save(tensors, {"sha256": checksum(tensors)}))


def recall(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """Read tensors for a network from a file; None where it is missing, damaged, or for another network."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged (%s); training again", path, error)
        return None
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if checksum(state) != expected or {name: t.shape for name, t in state.items()} != shapes:
        log.warning("%s is damaged or of another network; training again", path)
        return None
    return state
