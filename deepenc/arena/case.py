"""The case that the arena hands to an attack, the claim it gets back, and the interface between."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deepenc.arena.threat import Meter, Needs, Threat
from deepenc.errors import ClaimError
from deepenc.network.sites import Site
from deepenc.network.surgery import Layout, narrow_sites, remove
from deepenc.plugins import Plugin
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task

Weakness = Literal["loud", "duplicates", "defaults", "statistics", "noise", "damage", "clones"]
"""What planted confusion channels give away (`deepenc.arena.checks.planted`)."""


@dataclass(frozen=True, eq=False)
class Release:
    """Another release of the victim, encrypted under another key.

    Attributes:
        encrypted: The network, in eval mode.
        sites: Its sites, of the same names as the case's.
        allocation: Its confusion channels per site, or None where the threat model withholds them.
    """

    encrypted: nn.Module
    sites: tuple[Site, ...]
    allocation: Mapping[str, int] | None


@dataclass(frozen=True, eq=False)
class Case:
    """Everything the attacker is entitled to, and nothing else.

    Attributes:
        encrypted: The encrypted network, in eval mode; not to be changed, since one attack may hand its case
            to another: work on `copy`.
        sites: Sites of the encrypted network, confusion channels included in their widths. Anyone who
            traces the network finds the same.
        allocation: Confusion channels per site, or None where the threat model withholds it.
        known: Confusion positions that leaked, per site, empty unless ``threat.key_fraction > 0``.
        labelled: Examples with their targets; may be none.
        unlabelled: Examples without targets; may be none.
        task: What the network is for: how a batch is run, its loss, what its outputs say.
        example: An input without content (zeros), as a batch of one.
        defense: Name and public parameters of the defense.
        threat: What the attacker knows, holds and may spend.
        seed: The attacker's own seed, in [0, 2**63).
        device: Where the networks and images are.
        releases: Further releases under other keys; empty unless ``threat.releases > 0``.
    """

    encrypted: nn.Module
    sites: tuple[Site, ...]
    allocation: Mapping[str, int] | None
    known: Mapping[str, tuple[int, ...]]
    labelled: Examples
    unlabelled: Examples
    task: Task
    example: Any
    defense: Mapping[str, Any]
    threat: Threat
    seed: int
    device: torch.device
    meter: Meter = field(repr=False)
    blank: Callable[[int], nn.Module] | None = field(repr=False)
    """Makes a freshly initialised network of the victim's architecture from a seed; None where the
    threat model withholds the architecture."""
    public: nn.Module | None = field(default=None, repr=False)
    """The public network that the victim was fine-tuned from, in eval mode; its layers have the victim's
    names, its head may differ. None where the threat model gives none, or there is none."""
    oracle: Callable[[Any], Any] | None = field(default=None, repr=False)
    """The authorised model: a batch of inputs to its outputs, a query for each. None where the
    threat model allows no queries."""
    releases: tuple[Release, ...] = ()

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator seeded with the attacker's seed; the same sequence at every call."""
        return torch.Generator(device).manual_seed(self.seed)

    def counts(self) -> Mapping[str, int]:
        """The allocation, for attacks that cannot do without.

        Raises:
            ClaimError: The threat model withholds it.
        """
        if self.allocation is None:
            raise ClaimError("the attack needs ΔC per site: `allocation: true` in the threat model")
        return self.allocation

    def copy(self) -> nn.Module:
        """A deep copy of the encrypted network, metered like it."""
        return copy.deepcopy(self.encrypted)

    def remove(self, channels: Mapping[str, tuple[int, ...]], network: nn.Module | None = None) -> nn.Module:
        """Take channels out of the encrypted network.

        Args:
            channels: Site name to the channels to remove, as positions in ``sites``.
            network: A changed copy of the encrypted network to take them from; default: itself.

        Returns:
            A new network, metered like the encrypted one.

        Raises:
            SiteError: Positions that a site does not have, or all of a site's channels.
        """
        layout = Layout(narrow_sites(self.sites, channels), channels)
        return remove(self.encrypted if network is None else network, layout)

    def without(self, channels: Mapping[str, tuple[int, ...]], network: nn.Module | None = None) -> Case:
        """The case that is left when channels are removed, on the same meter.

        Channels that are removed count as confusion channels: ΔC falls by as many, not below 0. Nothing is
        known of the positions that are left.

        Args:
            channels: As for `remove`.
            network: As for `remove`.
        """
        allocation = self.allocation
        if allocation is not None:
            allocation = {n: max(0, c - len(channels.get(n, ()))) for n, c in allocation.items()}
        return replace(
            self,
            encrypted=self.remove(channels, network),
            sites=narrow_sites(self.sites, channels),
            allocation=allocation,
            known={},
        )

    def with_network(self, network: nn.Module) -> Case:
        """The same case around a changed copy of the encrypted network."""
        return replace(self, encrypted=network)


@dataclass(frozen=True, eq=False)
class Claim:
    """What an attack hands back: scores, or a network, or both. The arena measures them.

    Attributes:
        scores: Site name to suspicion per channel, ``(width,)`` of the encrypted site, finite; higher means
            more likely a confusion channel. Sites left out count as not suspected at all.
        network: A network that does the victim's task. Where it is missing and the allocation is known,
            the arena removes the ΔC most suspect channels of each site and judges what is left.
        diverged: Whether an optimisation ran into numbers that are not finite; the claim is from before.
    """

    scores: Mapping[str, Tensor] | None = None
    network: nn.Module | None = None
    diverged: bool = False


class Attack(Plugin):
    """Tries to get the victim's worth out of a case.

    Attributes:
        reference: What the attack is a reference for, if it is one: ``"floor"`` uses the encrypted network
            as it is; ``"scratch"`` uses no stolen weights.
        detects: The planted weakness that the attack must see in its self-test (`arena.checks.planted`); None
            where it promises nothing.
    """

    kind: ClassVar[str] = "attack"
    reference: ClassVar[Literal["floor", "scratch"] | None] = None
    detects: ClassVar[Weakness | None] = None

    @property
    def needs(self) -> Needs:
        """The least the threat model must give."""
        return Needs()

    def pointless(self, case: Case) -> str | None:
        """Why there is nothing to attack in this case, in words; the arena asks before it attacks.

        Args:
            case: What `attack` would be given.

        Returns:
            None where the attack may do something.
        """
        return None

    @abstractmethod
    def attack(self, case: Case) -> Claim:
        """Attack one case.

        Args:
            case: What the attacker has. Its random numbers come from ``case.seed`` only.

        Returns:
            Scores, a network, or both.
        """
