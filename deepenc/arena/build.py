"""Build the case: everything the attacker is entitled to, in tensors that nobody else owns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deepenc.arena.case import Case, Release
from deepenc.arena.oracle import Oracle
from deepenc.arena.threat import Meter, Threat
from deepenc.encryption.cost.costs import memory
from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import encrypt, reshelter
from deepenc.encryption.keys.key import Key
from deepenc.encryption.tensors import tensors_of
from deepenc.network.find import find_sites
from deepenc.network.initial import resetting, seeded
from deepenc.network.sites import Role, Site
from deepenc.network.structure import named_tensors, replace_tensors
from deepenc.network.surgery import replace_widened
from deepenc.seeds import derive, number
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task
from deepenc.victims.recipe import Recipe
from deepenc.victims.training import fit as train
from deepenc.victims.victim import Victim


@dataclass(frozen=True, eq=False)
class Subject:
    """A victim and its sites: what all duels over it share."""

    victim: Victim
    sites: tuple[Site, ...]

    @classmethod
    def of(cls, victim: Victim) -> Subject:
        """Find the sites of a victim.

        Raises:
            TraceError: Its operators cannot be followed.
            SiteError: It has no site.
        """
        sites = find_sites(victim.model, victim.example, streams=victim.streams, scope=victim.scope)
        return cls(victim, tuple(sites))


@dataclass(frozen=True, eq=False)
class Encryption:
    """A victim under a defense and a key; made once, fought over many times.

    Attributes:
        subject: The victim and its sites.
        defense: The defense.
        tensors: All tensors of the encrypted network, by state-dict name.
        key: Where the confusion channels are.
        memory: Measured ΔMem / Mem.
        secret: The defender's; never part of a case.
    """

    subject: Subject
    defense: Defense
    tensors: Mapping[str, Tensor]
    key: Key
    memory: float
    secret: bytes = field(repr=False)
    _further: dict[tuple[int, int], tuple[Encryption, ...]] = field(
        default_factory=dict, repr=False, init=False
    )

    @classmethod
    def of(cls, subject: Subject, defense: Defense, secret: bytes) -> Encryption:
        """Encrypt a victim.

        Args:
            subject: The victim.
            defense: The defense.
            secret: The defender's 32-byte secret; it determines the positions.
        """
        victim = subject.victim
        network, key = encrypt(
            victim.model,
            victim.example,
            defense,
            secret=secret,
            sites=subject.sites,
            data=victim.defender.kept(),
            task=victim.task,
        )
        return cls._made(subject, defense, network, key, secret)

    @classmethod
    def _made(
        cls, subject: Subject, defense: Defense, network: nn.Module, key: Key, secret: bytes
    ) -> Encryption:
        model, sites = subject.victim.model, subject.sites
        cost = memory(tensors_of(model, sites), sites, key.allocation)
        tensors = {name: tensor.detach() for name, tensor in named_tensors(network).items()}
        return cls(subject, defense, tensors, key, cost.ratio, secret)

    def again(self, subject: Subject, secret: bytes) -> Encryption:
        """A later release of the model: one that follows this one, or, where the defense has none, a new one.

        Args:
            subject: The victim as it is now, maybe fine-tuned.
            secret: Of the new release.
        """
        if not any(step.follows for step in self.defense.hardening):
            return Encryption.of(subject, self.defense, secret)
        victim = subject.victim
        network, key = reshelter(
            victim.model,
            self.key,
            self.defense,
            example=victim.example,
            previous=replace_widened(self.subject.victim.model, self.tensors, self.key.layout()),
            secret=secret,
            data=victim.defender.kept(),
            task=victim.task,
        )
        return self._made(subject, self.defense, network, key, secret)

    def releases(self, count: int, drift: int) -> tuple[Encryption, ...]:
        """Further releases of the same model, each under a key of its own, or following the one before.

        The latest are kept, and go with this release: several attacks on it hold the same.

        Args:
            count: How many.
            drift: Optimiser steps by which the owner fine-tuned the model before each, on the defender's
                images (SGD, learning rate 0.01); each release goes on from the one before.
        """
        if count and (count, drift) not in self._further:
            self._further.clear()
            self._further[count, drift] = tuple(self._successors(count, drift))
        return self._further[count, drift] if count else ()

    def _successors(self, count: int, drift: int) -> Iterator[Encryption]:
        victim, last = self.subject.victim, self
        for index in range(count):
            secret = derive(self.secret, "release", index)
            if drift:
                model = _plain_copy(victim.model, torch.device("cpu"))
                generator = torch.Generator().manual_seed(number(derive(secret, "drift")))
                recipe = Recipe(steps=drift, lr=0.01, final_lr=0.01)
                train(model, victim.task, victim.defender, recipe, generator)
                victim = replace(victim, model=model)
            last = last.again(Subject(victim, self.subject.sites), secret)
            yield last


def fresh(encryption: Encryption, device: torch.device) -> nn.Module:
    """A copy of the encrypted network that carries nothing but its tensors' values.

    Its structure is copied from the victim's, so that whatever a defense may have left on its network
    (attributes, hooks, views into larger storages) stays behind.
    """
    tensors = {
        name: tensor.to(device, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in encryption.tensors.items()
    }
    network = replace_widened(encryption.subject.victim.model, tensors, encryption.key.layout())
    for module in network.modules():
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            hooks.clear()
    return network.eval()


def build_case(
    encryption: Encryption, threat: Threat, seed: int, leak_seed: int, device: torch.device
) -> Case:
    """Make the attacker's case.

    Args:
        encryption: What is attacked.
        threat: What the attacker knows, holds and may spend; no more examples than the victim's
            attacker part has.
        seed: The attacker's own seed, which also draws its examples, in [0, 2**63).
        leak_seed: Draws the positions that leak; not to be told to the attacker.
        device: Where the networks and images shall be.
    """
    victim, key = encryption.subject.victim, encryption.key
    meter = Meter(threat)
    public = victim.public if threat.public_checkpoint else None
    sites = key.layout().widened_sites()
    labelled, unlabelled = draw(victim.attacker, victim.task, threat, seed)
    widened = {
        slot.tensor: slot.role for site in sites for slot in site.slots if key.positions.get(site.name)
    }
    network = meter.watch(fresh(encryption, device))
    plain = victim.model if victim.plain is None else victim.plain
    blank = Blank(plain, named_tensors(network), widened, meter) if threat.architecture else None
    return Case(
        encrypted=network,
        sites=sites,
        allocation=dict(key.allocation) if threat.allocation else None,
        known=_leak(key.positions, threat.key_fraction, leak_seed),
        labelled=labelled.to(device),
        unlabelled=unlabelled.to(device),
        task=victim.task,
        example=tree_map(partial(_emptied, device=device), victim.example),
        defense=encryption.defense.spec(),
        threat=threat.model_copy(),  # its own: a frozen model can be written to by force
        seed=seed,
        device=device,
        meter=meter,
        blank=blank,
        public=None if public is None else meter.watch(_plain_copy(public, device)),
        oracle=Oracle(victim.model, victim.task, device, meter) if threat.oracle else None,
        releases=tuple(
            _release(other, threat, device, meter)
            for other in encryption.releases(threat.releases, threat.drift)
        ),
    )


def _plain_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in eval mode that shares nothing with the model."""
    tensors = {name: t.to(device, copy=True) for name, t in named_tensors(model).items()}
    return replace_tensors(model, tensors).eval()


def _release(encryption: Encryption, threat: Threat, device: torch.device, meter: Meter) -> Release:
    key = encryption.key
    return Release(
        encrypted=meter.watch(fresh(encryption, device)),
        sites=key.layout().widened_sites(),
        allocation=dict(key.allocation) if threat.allocation else None,
    )


def draw(examples: Examples, task: Task, threat: Threat, seed: int) -> tuple[Examples, Examples]:
    """Labelled and unlabelled examples, disjoint, the same for the same seed; copies, or read when needed."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(examples)))
    if threat.balanced and threat.labelled and "labels" in task.offers:
        order = order[_in_turn(task.labels(examples[order].targets).cpu())]
    first, second = order[: threat.labelled], order[threat.labelled : threat.labelled + threat.unlabelled]
    return examples[first], examples[second].without_targets()


def _in_turn(labels: Tensor) -> Tensor:
    """An order in which the classes take turns, each in its own order, ``(examples,)``."""
    seen: Counter[int] = Counter()
    turns = []
    for label in labels.tolist():
        turns.append(seen[label])
        seen[label] += 1
    return torch.tensor(turns).argsort(stable=True)


def _emptied(leaf: Any, device: torch.device) -> Any:
    return torch.zeros_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf


def _leak(positions: Mapping[str, tuple[int, ...]], fraction: float, seed: int) -> dict[str, tuple[int, ...]]:
    """A fraction of all positions, rounded half up, drawn over all sites alike.

    Drawn at each site by itself, half of a single channel would round to the whole of it.
    """
    every = [(name, position) for name, chosen in sorted(positions.items()) for position in chosen]
    count = math.floor(fraction * len(every) + 0.5)
    leaked: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).choice(len(every), size=count, replace=False) if count else ():
        name, position = every[index]
        leaked.setdefault(name, []).append(position)
    return {name: tuple(sorted(leaked[name])) for name in positions if name in leaked}


def _begin(module: nn.Module) -> None:
    """Initialise the own parameters of a layer that cannot do so itself."""
    # Libraries have normalisations of their own, which only their names tell (LlamaRMSNorm, T5LayerNorm).
    norm = "Norm" in type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        if norm and parameter.ndim == 1:
            nn.init.constant_(parameter, float(name == "weight"))
        else:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)


class Blank:
    """Makes freshly initialised networks of the victim's architecture.

    Layers initialise themselves (``reset_parameters``), a parameter that several share as the last of them
    does; normalisations that cannot start with factors of 1 and offsets of 0. Parameters that belong to no
    such layer (class tokens, position embeddings) are drawn from a normal distribution of deviation 0.02,
    truncated at 2 deviations. Buffers that nobody resets are constants of the architecture and are copied,
    except where they carry confusion channels: their order would tell the key, so that scales become 1, the
    rest 0.

    Args:
        model: The victim's network, as it is trained; only its structure is kept.
        tensors: The encrypted network's tensors, for the constants.
        widened: Role of every tensor that carries confusion channels.
        meter: Watches the networks made.
    """

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], widened: Mapping[str, Role], meter: Meter
    ) -> None:
        own = named_tensors(model)
        self._skeleton = replace_tensors(model, {name: tensor.to("meta") for name, tensor in own.items()})
        self._device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self._roles = dict(widened)
        constants = {
            name
            for path, module in model.named_modules()
            if resetting(module) is None
            for name, _ in module.named_buffers(path, recurse=False)
        }
        self._constants = {name: tensors[name].clone() for name in sorted(constants - set(widened))}
        self._meter = meter

    def __call__(self, seed: int) -> nn.Module:
        """A new network, in training mode, metered; the same one for the same seed."""
        empty = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=self._device)
            for name, tensor in named_tensors(self._skeleton).items()
        }
        network = replace_tensors(self._skeleton, empty)
        with seeded(seed, empty.values()):
            self._initialise(network)
        return self._meter.watch(network.train())

    def _initialise(self, network: nn.Module) -> None:
        # Inner layers first: an outer one that resets its inner ones (attention) has the last word.
        done: set[nn.Parameter] = set()
        for path, module in reversed(list(network.named_modules())):
            own = set(module.parameters(recurse=False))
            if own and own <= done:  # an embedding whose weights are the head's
                continue
            done |= own
            reset = resetting(module)
            if reset is not None:
                reset()
                continue
            _begin(module)
            for name, buffer in module.named_buffers(path, recurse=False):
                if name in self._constants:
                    buffer.copy_(self._constants[name])
                elif self._roles.get(name) in (Role.SCALE, Role.VARIANCE):
                    buffer.fill_(1)
