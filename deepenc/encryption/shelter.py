"""Put confusion channels into a victim: arrange, widen, fill, harden; what plugins return is validated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import save as pack
from torch import Tensor, nn

from deepenc.encryption.defense import Defense, Gap, Hardening, Neurons, Original, Weights, filled
from deepenc.encryption.filling.entries import confusion_mask
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, verify
from deepenc.encryption.keys.secret import derive_binding, derive_rng
from deepenc.encryption.tensors import names_in, tensors_of
from deepenc.errors import ConfigError, PluginError, SiteError
from deepenc.network.arrangement import Arrangement, proved
from deepenc.network.structure import State, named_tensors, replace_tensors
from deepenc.network.surgery import Layout, narrow, replace_widened, widened
from deepenc.plugins import Plugin


def arrangement_of(defense: Defense, original: Original, secret: bytes, release: str) -> Arrangement:
    """How a defense orders and scales the victim's own channels, as far as that is proved to change nothing.

    Args:
        defense: Its hardening is asked.
        original: The victim and the defender's data.
        secret: 32 bytes.
        release: Fingerprint of the last release; empty for the first.

    Raises:
        ConfigError: Two steps of the defense arrange the victim.
        SiteError: An arrangement that does not fit the sites.
    """
    found = Arrangement()
    for number, step in enumerate(defense.hardening):
        wanted = step.arrange(original, derive_rng(secret, f"arrangement {number} {release}"))
        if wanted and found:
            raise ConfigError(f"the defense {defense.name!r} arranges the victim twice; leave one step out")
        found = found or wanted
    found.check(original.sites)
    return proved(original.model, original.example, original.sites, found) if found else found


def _arranged(original: Original, arrangement: Arrangement) -> Original:
    if not arrangement:
        return original
    changed = arrangement.apply(named_tensors(original.model), original.sites)
    return replace(original, model=replace_tensors(original.model, changed))


def shelter(
    original: Original,
    positions: Mapping[str, tuple[int, ...]],
    arrangement: Arrangement,
    defense: Defense,
    secret: bytes,
    release: str,
) -> tuple[nn.Module, Key]:
    """Make a release: arrange the victim, insert confusion channels, fill and harden them.

    Args:
        original: The victim, as it is, and the defender's data.
        positions: Of the confusion channels, by site.
        arrangement: From `arrangement_of`, or of the last release.
        defense: Its weights and hardening are used.
        secret: 32 bytes.
        release: Fingerprint of the last release, whose numbers are not drawn again; empty for the first.

    Raises:
        ConfigError: The defense withholds tensors before the step that later releases start from.
        PluginError: A plugin of the defense broke its interface.
        SiteError: The network is not that of the sites.
    """
    layout = Layout(original.sites, positions)
    arranged = _arranged(original, arrangement)
    _last_following(defense, arranged)
    victim = tensors_of(arranged.model, original.sites)
    if strangers := sorted(set(layout.changed()) - set(victim)):
        raise SiteError(f"the network lacks the sites' tensors {strangers[:5]}; are they another network's?")
    tensors = widened(victim, layout)
    assert defense.weights is not None
    fill(layout, victim, tensors, partial(derived, defense.weights, secret=secret, release=release))
    network = replace_widened(arranged.model, tensors, layout)
    withheld = _harden(network, layout, arranged, defense.hardening, secret, release)
    return network, _key(network, original, positions, arrangement, withheld, secret)


def follow(
    original: Original, key: Key, previous: nn.Module, defense: Defense, secret: bytes
) -> tuple[nn.Module, Key]:
    """Make the release that follows an earlier one, at the same positions and in the same arrangement.

    Args:
        original: The victim, fine-tuned since, and the defender's data.
        key: Of the earlier release.
        previous: The earlier release.
        defense: One with a hardening that follows.
        secret: 32 bytes.

    Raises:
        ConfigError: The defense withholds tensors before the step that later releases start from.
        KeyFileError: The key is not that of the earlier release.
        PluginError: A plugin of the defense broke its interface.
        SiteError: The victim is not of the earlier release's architecture.
    """
    layout, release = key.layout(), key.fingerprint
    old = tensors_of(previous, key.sites)
    verify(old, key)
    arranged = _arranged(original, key.arrangement)
    victim = tensors_of(arranged.model, key.sites)
    if strangers := sorted(set(old) ^ set(victim)):
        raise SiteError(f"the tensors {strangers[:5]} are not in both networks; is the victim another one?")
    tensors = widened(victim, layout)
    for name, tensor in tensors.items():
        if old[name].shape != tensor.shape or old[name].dtype != tensor.dtype:
            raise SiteError(f"tensor {name!r} has another shape or dtype than that of the last release")
        tensors[name] = torch.where(
            confusion_mask(layout, name, tensor.shape).to(tensor.device), old[name], tensor
        )
    network = replace_widened(arranged.model, tensors, layout)
    before = old | _true_tensors(key, old)
    last = _last_following(defense, arranged)
    step = defense.hardening[last]
    step.follow(network, layout, before, arranged, derive_rng(secret, f"following {last} {release}"))
    _check_hardened(step, network, layout, victim, set())
    withheld = _harden(network, layout, arranged, defense.hardening, secret, release, first=last + 1)
    return network, _key(network, original, key.positions, key.arrangement, withheld, secret)


def _last_following(defense: Defense, arranged: Original) -> int:
    """The number of the last step that follows an earlier release, -1 where none does.

    Steps before it are not taken again: a later release would show what one of them withheld.
    """
    last = max((number for number, step in enumerate(defense.hardening) if step.follows), default=-1)
    for step in defense.hardening[: max(last, 0)]:
        if step.withholds(arranged):
            follower = defense.hardening[last].name
            raise ConfigError(
                f"hardening {step.name!r} stands before {follower!r}, and the next release would carry what "
                f"it withholds; put {step.name!r} behind {follower!r}"
            )
    return last


def _true_tensors(key: Key, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a release replaced, widened as in the release: true where the victim's entries are."""
    layout, result = key.layout(), {}
    for name, tensor in key.withheld_tensors().items():
        arranged = key.arrangement.apply({name: tensor}, key.sites).get(name, tensor)
        whole = released[name].clone()
        real = ~confusion_mask(layout, name, whole.shape).to(whole.device)
        result[name] = whole.masked_scatter(real, arranged.to(whole.device))
    return result


def _harden(
    network: nn.Module,
    layout: Layout,
    arranged: Original,
    steps: Sequence[Hardening],
    secret: bytes,
    release: str,
    first: int = 0,
) -> set[str]:
    """Take the hardening steps, from the first on; returns the names of the tensors that are withheld."""
    victim = tensors_of(arranged.model, arranged.sites)
    withheld: set[str] = set()
    for number, step in enumerate(steps):
        if number >= first:
            wanted = set(step.withholds(arranged))
            if strangers := sorted(wanted - set(victim)):
                raise PluginError(f"hardening {step.name!r} withholds {strangers[:5]}, which there is not")
            withheld |= wanted
            step.harden(network, layout, arranged, derive_rng(secret, f"hardening {number} {release}"))
            _check_hardened(step, network, layout, victim, withheld)
    return withheld


def _key(
    network: nn.Module,
    original: Original,
    positions: Mapping[str, tuple[int, ...]],
    arrangement: Arrangement,
    withheld: set[str],
    secret: bytes,
) -> Key:
    mark = fingerprint(tensors_of(network, original.sites))
    victim = tensors_of(original.model, original.sites)
    kept = {name: victim[name].detach().cpu().clone() for name in sorted(withheld)}
    packed = pack(kept) if kept else b""
    return Key(original.sites, dict(positions), mark, arrangement, packed, derive_binding(secret))


def derived(weights: Weights, neurons: Neurons, secret: bytes, release: str = "") -> list[Tensor]:
    """What a secret fills one site's confusion channels with, all of them or those in some tensors.

    Args:
        weights: Makes the values.
        neurons: What to fill.
        secret: 32 bytes.
        release: Fingerprint of the last release; empty for the first.

    Raises:
        PluginError: The weights broke their interface.
    """

    def drawn_for(gap: Gap) -> str:
        return f"{gap.slot.tensor} " if weights.per_tensor else ""

    made: dict[Gap, Tensor] = {}
    for name in dict.fromkeys(map(drawn_for, neurons.gaps)):
        part = replace(neurons, gaps=tuple(gap for gap in neurons.gaps if drawn_for(gap) == name))
        rng = derive_rng(secret, f"weights {name}{release}", neurons.site.name)
        channels = derive_rng(secret, f"channels {release}", neurons.site.name)
        made |= zip(part.gaps, filled(weights, part, rng, channels), strict=True)
    return [made[gap] for gap in neurons.gaps]


def fill(layout: Layout, victim: State, tensors: State, make: Callable[[Neurons], Sequence[Tensor]]) -> None:
    """Fill confusion channels, in place in the widened tensors.

    Args:
        layout: Where the victim's entries lie.
        victim: Its tensors.
        tensors: The widened ones.
        make: Gives a tensor for each gap of a site.
    """
    for site in layout.sites:
        if layout.positions[site.name]:
            neurons = Neurons.of(site, layout, victim)
            for gap, value in zip(neurons.gaps, make(neurons), strict=True):
                target = tensors[gap.slot.tensor]
                entries = layout.confusion_entries(site, gap.slot)
                target.index_copy_(gap.slot.dim, entries.to(target.device), value.to(target.device))


def _check_hardened(
    step: Plugin, network: nn.Module, layout: Layout, victim: Mapping[str, Tensor], withheld: set[str]
) -> None:
    """Hold a hardening to its word: it may change confusion entries, and what is withheld, only."""
    blame = f"hardening {step.name!r}"
    now = tensors_of(network, layout.sites)
    if set(now) != set(victim):
        raise PluginError(f"{blame} added or took away tensors: {sorted(set(now) ^ set(victim))[:5]}")
    known = names_in(layout, victim)
    for name, tensor in victim.items():
        shape = layout.widened_shape(known[name], tensor.shape)
        if now[name].shape != shape or now[name].dtype != tensor.dtype:
            raise PluginError(
                f"{blame} made tensor {name!r} {now[name].dtype} {tuple(now[name].shape)}, it was "
                f"{tensor.dtype} {shape}; change values only"
            )
        real = narrow(now[name], layout.kept(known[name], tensor.shape))
        if name not in withheld and not torch.equal(real, tensor):
            raise PluginError(
                f"{blame} changed real entries of tensor {name!r}; removal would not give the victim back"
            )
        if not torch.isfinite(now[name]).all() and torch.isfinite(tensor).all():
            raise PluginError(f"{blame} made entries of tensor {name!r} NaN or infinite")
