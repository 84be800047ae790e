"""Encrypt a network, decrypt it, and shelter it again after fine-tuning (Section 2.2)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deepenc.encryption.defense import Allocation, Defense, Original
from deepenc.encryption.keys.fingerprint import fingerprint
from deepenc.encryption.keys.key import Key, check_sites, expect_key, verify
from deepenc.encryption.keys.secret import derive_positions, derive_rng, secret_of
from deepenc.encryption.shelter import arrangement_of, follow, shelter
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError, PluginError, SiteError
from deepenc.network.find import find_sites
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import remove
from deepenc.plugins import Plugin
from deepenc.tasks.task import Task

DefenseLike = Defense | str | Mapping[str, Any] | None
"""A defense, the name of a registered one, or a mapping that describes one; None is the null defense."""


def encrypt(
    model: nn.Module,
    example: Any,
    defense: DefenseLike = "paper-samp",
    *,
    seed: int | None = None,
    secret: bytes | None = None,
    sites: Sequence[Site] | None = None,
    streams: bool = False,
    scope: str = "",
    data: Any = None,
    task: Task | str = "classification",
) -> tuple[nn.Module, Key]:
    """Insert confusion channels into a copy of a network.

    Args:
        model: The victim; left as it is.
        example: An example input: a tensor, or a tuple or dict of them.
        defense: The defense, its name, or a mapping.
        seed: Makes the run repeatable. Whoever guesses the seed has the key: for tests and experiments.
        secret: 32 secret bytes from which everything is derived; alone it is a whole key. Default: fresh
            ones from the operating system.
        sites: The victim's sites, where they are known; default: `find_sites` finds them.
        streams: See `find_sites`.
        scope: See `find_sites`.
        data: The defender's examples D of Equation 1, for defenses that want them: a batch of inputs, a
            data set of pairs (input, target), or `deepenc.tasks.examples.Examples`.
        task: What the network is for, or its name; defenses that want data measure by it.

    Returns:
        The encrypted network, sharing no tensor with the victim, and its key.

    Raises:
        ConfigError: Invalid arguments, or an allocation that inserts nothing.
        PluginError: A plugin of the defense is unknown or broke its interface.
        SiteError: The network has no sites, or the given ones do not fit it.
        TraceError: The network's operators cannot be followed.
    """
    chosen = Defense.of(defense)
    root = secret_of(seed, secret)
    if sites is None:
        sites = find_sites(model, example, streams=streams, scope=scope)
    if chosen.placement is None:
        return _unprotected(model, sites)
    if not sites:
        raise SiteError(
            "the network has no site at which channels could be inserted; ask `deepenc inspect --why`"
        )
    check_sites(sites)
    original = Original(model, tuple(sites), example, data, Task.build(task))
    allocation = chosen.placement.place(original, derive_rng(root, "placement"))
    allocation = checked(chosen.placement, allocation, original.sites)
    arrangement = arrangement_of(chosen, original, root, "")
    return shelter(original, derive_positions(root, sites, allocation), arrangement, chosen, root, "")


def decrypt(encrypted: nn.Module, key: Key) -> nn.Module:
    """Take the confusion channels out of a copy of an encrypted network.

    Args:
        encrypted: From `encrypt`; left as it is.
        key: Its key.

    Returns:
        The victim: every tensor is equal to the original bit for bit.

    Raises:
        KeyFileError: The key is another network's, or a tensor was changed since it was made.
    """
    verify(tensors_of(encrypted, expect_key(key).sites), key)
    network = remove(encrypted, key.layout())
    changed = key.restored(named_tensors(network))
    return replace_tensors(network, changed) if changed else network


def reshelter(
    model: nn.Module,
    key: Key,
    defense: DefenseLike = "paper-samp",
    *,
    example: Any,
    rotate: bool = False,
    previous: nn.Module | None = None,
    seed: int | None = None,
    secret: bytes | None = None,
    data: Any = None,
    task: Task | str = "classification",
) -> tuple[nn.Module, Key]:
    """Encrypt a decrypted network again: new confusion weights, at the same positions or at new ones.

    The paper does it after authorised fine-tuning, by "calling the initialisation module one more time"
    (Section 2.2). **Do not release both networks**: fine-tuned weights have moved a little, redrawn ones
    altogether, so that whoever holds both releases reads the key off their difference. New positions do
    not change that: the victim's channels are those that both releases have (docs/keys.md has figures).
    With ``previous`` nothing is drawn: the confusion channels move as the victim's did, by that hardening of
    the defense which follows (``drift``), and the steps after it are taken again. Without it,
    withdraw the old release first.

    Args:
        model: The fine-tuned network, of the victim's architecture; left as it is.
        key: The key of the first encryption.
        defense: Its weights and hardening are applied; its placement is not asked again.
        example: An example input.
        rotate: Draw new positions, as many at each site as the old key has. The old key, once leaked, then
            opens nothing that is released from now on.
        previous: The last release, to be followed.
        seed: Makes the run repeatable; whoever guesses the seed knows the confusion weights, and the new
            positions.
        secret: 32 secret bytes instead of a seed; default: fresh ones.
        data: As for `encrypt`.
        task: As for `encrypt`.

    Returns:
        The encrypted network and its key, which, if not rotated, differs from the first only in the
        fingerprint.

    Raises:
        ConfigError: The defense inserts nothing, or the new positions are the old ones, or the defense has no
            step that follows an earlier release, or that shall be followed and rotated.
        KeyFileError: The key is not that of the last release.
        PluginError: A plugin of the defense is unknown or broke its interface.
        SiteError: The network is not of the key's architecture.
    """
    chosen = Defense.of(defense)
    if chosen.placement is None:
        raise ConfigError(f"the defense {chosen.name!r} inserts nothing; reshelter with one that does")
    original = Original(model, key.sites, example, data, Task.build(task))
    root = secret_of(seed, secret)
    if previous is not None:
        if rotate or not any(step.follows for step in chosen.hardening):
            raise ConfigError(
                "expected a defense with a hardening that follows the last release, such as 'drift', and the "
                f"same positions; got {chosen.name!r}{', rotated' if rotate else ''}"
            )
        return follow(original, key, previous, chosen, root)
    positions, arrangement = key.positions, key.arrangement
    if rotate:
        arrangement = arrangement_of(chosen, original, root, key.fingerprint)
        positions = derive_positions(root, key.sites, key.allocation)
        if positions == dict(key.positions):
            raise ConfigError("the new positions are the old key's; rotate with another secret or seed")
    # Bound to the last release: the same seed twice must not draw the same confusion weights twice.
    return shelter(original, positions, arrangement, chosen, root, key.fingerprint)


def _unprotected(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, Key]:
    released = copy.deepcopy(model)
    return released, Key(tuple(sites), {}, fingerprint(tensors_of(released, sites)))


def checked(placement: Plugin, allocation: object, sites: Sequence[Site]) -> Allocation:
    """What a placement returned, as plain integers, if it is an allocation at all."""
    blame = f"placement {placement.name!r}"
    if not isinstance(allocation, Mapping):
        raise PluginError(f"{blame}: expected site names mapped to counts, got {type(allocation).__name__}")
    known = {site.name for site in sites}
    counts: Allocation = {}
    for name, count in allocation.items():
        if name not in known:
            raise PluginError(f"{blame}: the network has no site {name!r}; return names of `original.sites`")
        try:
            counts[name] = operator.index(count)
        except TypeError:
            raise PluginError(f"{blame}, site {name!r}: expected an integer count, got {count!r}") from None
        if isinstance(count, bool) or count < 0:
            raise PluginError(f"{blame}, site {name!r}: expected a count >= 0, got {count!r}")
    if not any(counts.values()):
        raise ConfigError(
            f"{blame} inserts nothing: its budget rounds to no channel at any site; ask for more, or use "
            "the defense 'null' if nothing is meant"
        )
    return counts
