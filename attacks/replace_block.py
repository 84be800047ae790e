"""Throwing a part of the network away and training a new one in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from deepenc.arena.case import Case, Claim
from deepenc.arena.kit.training import TrainedAttack, affordable, train
from deepenc.encryption.cost.allocation import Patterns, select
from deepenc.network.initial import resetting, seeded
from deepenc.network.sites import Role, Site, Slot
from deepenc.network.structure import named_tensors
from deepenc.victims.recipe import Recipe


class ReplaceBlock(TrainedAttack):
    """Throw the first site, or any, away, and train a new one in its place.

    The paper's own warning: confusion channels that are all in the first block invite it. Whatever belongs
    to the sites' channels, incoming and outgoing weights and normalisation, is initialised again, at the
    true width where the threat model tells it; then the new part is trained, then everything.
    """

    name: ClassVar[str] = "replace-block"

    sites: Annotated[int, Field(ge=1)] | Patterns = 1
    """How many of the first sites, or patterns of site names, to replace."""
    warm: int = Field(40, ge=0)
    """Optimiser steps in which only the new part's tensors are trained, before the recipe's steps."""
    lr: float = Field(0.01, gt=0)
    """First learning rate, of both phases."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        recipe = self.recipe()
        if affordable(case, recipe, case.labelled).steps == 0:
            return Claim(network=case.copy())
        names = {site.name for site in self.chosen(case.sites)}
        counts = case.allocation or {}
        # Which of their channels go tells nothing: all those that stay become new ones.
        smaller = case.without({name: tuple(range(n)) for name in names if (n := counts.get(name, 0))})
        network = smaller.copy()
        replaced = [site for site in smaller.sites if site.name in names]
        renew(network, replaced, case.seed)
        own = dict(network.named_parameters(remove_duplicate=False))
        touched = {slot.tensor: 1.0 for site in replaced for slot in site.slots if slot.tensor in own}
        warmed = False
        if self.warm:
            warmed = train(case, network, self.warming(), groups=touched).diverged
        claim = train(case, network, recipe)
        return replace(claim, diverged=claim.diverged or warmed)

    def warming(self) -> Recipe:
        """The recipe of the first phase."""
        return replace(self.recipe(), steps=self.warm)

    def chosen(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites to replace.

        Raises:
            ConfigError: A pattern matches none.
        """
        return tuple(sites[: self.sites]) if isinstance(self.sites, int) else select(sites, self.sites)


def renew(network: nn.Module, sites: Sequence[Site], seed: int) -> None:
    """Initialise all entries of sites again, in place, as their layers do it themselves.

    Args:
        network: The network.
        sites: Some of its sites.
        seed: Of the initialisation; the global generators stay as they are.
    """
    tensors = named_tensors(network)
    with seeded(seed, tensors.values()):
        fresh = {slot.tensor: initial(network, slot) for site in sites for slot in site.slots}
        for site in sites:
            for slot in site.slots:
                own, new = (slot.part(held[slot.tensor], site.width) for held in (tensors, fresh))
                own.copy_(new)


def initial(network: nn.Module, slot: Slot) -> Tensor:
    """A freshly initialised tensor for a slot's: by its layer, or as tensors of no layer usually are."""
    layer = copy.deepcopy(network.get_submodule(slot.module))
    tensor = named_tensors(layer)[slot.tensor.removeprefix(f"{slot.module}.")]
    if (reset := resetting(layer)) is not None:
        reset()
        return tensor
    if slot.role in (Role.SCALE, Role.VARIANCE):
        return tensor.fill_(1)
    return nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)
