"""State dicts, in which a tied tensor goes by several names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

from torch import Tensor, nn

from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout


def tensors_of(network: nn.Module, sites: Iterable[Site] = ()) -> dict[str, Tensor]:
    """The tensors of a network's state dict, detached, not copied.

    Args:
        network: Any network.
        sites: Where these lie in buffers that no state dict keeps (the frequencies of a rotary embedding),
            those buffers are among the result, at its end.
    """
    tensors = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    unkept = {slot.tensor for site in sites for slot in site.slots} - tensors.keys()
    own = named_tensors(network) if unkept else {}
    return tensors | {name: own[name].detach() for name in sorted(unkept & own.keys())}


def shared(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the names that stand for one tied tensor, in order."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        groups[place if tensor.numel() else name].append(name)
    return list(groups.values())


def names_in(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For each name the one of its tied names that the layout's slots use; itself where there is none."""
    changed = set(layout.changed())
    result: dict[str, str] = {}
    for names in shared(tensors):
        result |= dict.fromkeys(names, next((name for name in names if name in changed), names[0]))
    return result
