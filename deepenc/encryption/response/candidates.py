"""Equation 1 for many candidate allocations of one network, quickly.

Each site is filled once with the most channels that a candidate may have; a candidate has the first ΔC of
them. It runs only those operators whose inputs differ from those of the allocation that it was rebased on, or
of the one evaluated before it (see `response.replay`); a network whose operators depend on widths
or data in another way is run whole. Nothing is approximated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from deepenc import trees
from deepenc.encryption.defense import Allocation, Neurons, Original, Weights
from deepenc.encryption.defense import filled as weights_of
from deepenc.encryption.filling.inputs import draw
from deepenc.encryption.response.measure import Measure, ResponseReader
from deepenc.encryption.response.objective import Response
from deepenc.encryption.response.replay import Program, ReplayState, UnfitError
from deepenc.encryption.shelter import fill
from deepenc.encryption.tensors import tensors_of
from deepenc.errors import ConfigError
from deepenc.network.proving.probe import as_widened
from deepenc.network.structure import named_tensors
from deepenc.network.surgery import Layout, narrow, replace_widened, widened


class Candidates:
    """Responses of the allocations of one network, all of whose confusion channels are drawn.

    Args:
        original: The victim.
        tensors: Its widened tensors, filled, by name.
        layout: What widened them: behind the real channels of each site as many as a candidate may have.
        images: To measure on, a batch on the network's device.
        measure: What to compare; operators behind it are not run.
        batch_size: Images per forward pass.
        cache: Bytes of activations to keep for each of two allocations; where they are more, none are.

    Attributes:
        most: The largest count that a candidate may have, for each site.
        batches: The images.

    Raises:
        ConfigError: The network is in training mode, or there is nothing to compare: its outputs are no
            tensor ``(images, ...)``, there is no such layer, or confusion channels are among its outputs.
    """

    def __init__(
        self,
        original: Original,
        tensors: Mapping[str, Tensor],
        layout: Layout,
        images: Any,
        measure: Measure = "logits",
        batch_size: int = 64,
        cache: int = 2**30,
    ) -> None:
        self.most: Allocation = {name: len(places) for name, places in layout.positions.items()}
        self._model, self._wide, self._layout = original.model, tensors, layout
        self._filled = [site for site in layout.sites if self.most[site.name]]
        own = named_tensors(original.model)
        changed = {id(own[name]) for name in tensors}
        self._rest = {name: tensor for name, tensor in own.items() if id(tensor) not in changed}
        self._slots = defaultdict(list)
        for site in layout.sites:
            for slot in site.slots:
                self._slots[slot.tensor].append((site, layout.widened_slot(slot)))
        self.batches = trees.split(images, batch_size)
        self._reader = ResponseReader(original.model, measure, self.batches[0], original.task)
        with torch.no_grad():
            self._clean = [self._reader(self._model, batch) for batch in self.batches]
        self._norm = sum(clean.square().sum().item() for clean in self._clean)
        self._parts: dict[Hashable, Tensor] = {}
        self._base_parts: dict[Hashable, Tensor] = {}
        self._last: tuple[Allocation, Response] | None = None
        self._base_state: ReplayState | None = None
        self._last_state: ReplayState | None = None
        self._program = self._prepared(cache)

    @classmethod
    def of(
        cls,
        original: Original,
        weights: Weights,
        rng: np.random.Generator,
        most: Mapping[str, int],
        *,
        images: int = 64,
        blame: str = "a search over allocations",
        **options: Any,
    ) -> Self:
        """Fill confusion channels, and choose images.

        Args:
            original: The victim and the defender's data.
            weights: Fills the channels.
            rng: The only source of randomness.
            most: The largest count that any candidate has, for each site.
            images: Of the defender's, at most.
            blame: Who needs images, for the message where there are none.
            **options: ``measure``, ``batch_size`` and ``cache``, as for the class.

        Raises:
            ConfigError: Fewer than two images, or invalid counts.
        """
        inputs = draw(blame, original.model, original, rng, images)
        tensors, layout = filled(original, weights, rng, most)
        return cls(original, tensors, layout, inputs, **options)

    @property
    def fast(self) -> bool:
        """Whether candidates run only the operators that differ; else each runs the whole network."""
        return self._program is not None

    def network(self, allocation: Mapping[str, int]) -> nn.Module:
        """The encrypted network with the first confusion channels of each site; its tensors are shared.

        Sites that may have channels and have none compute as if they had: the last bits can differ.

        Raises:
            ConfigError: More channels than were filled, or fewer than none.
        """
        self._check(allocation)
        network = replace_widened(self._model, self._tensors(allocation), self._layout_of(allocation))
        as_widened(network, self._filled)
        return network

    def _layout_of(self, allocation: Mapping[str, int]) -> Layout:
        return Layout.appended(self._layout.sites, allocation)

    def _check(self, allocation: Mapping[str, int]) -> None:
        for name, count in allocation.items():
            if not 0 <= count <= self.most.get(name, 0):
                raise ConfigError(
                    f"expected 0 to {self.most.get(name, 0)} channels at site {name!r}, got {count}; ask "
                    "for more at first (`most`)"
                )

    def _tensors(self, allocation: Mapping[str, int]) -> dict[str, Tensor]:
        """The tensors of the encrypted network; those of the last allocations are not made again."""
        tensors, used = dict(self._rest), {}
        for name, wide in self._wide.items():
            counts = tuple(allocation.get(site.name, 0) for site, _ in self._slots[name])
            if (name, counts) not in self._parts:
                self._parts[name, counts] = self._narrowed(name, wide, counts)
            used[name, counts] = tensors[name] = self._parts[name, counts]
        self._parts = self._base_parts | used
        return tensors

    def _narrowed(self, name: str, wide: Tensor, counts: Sequence[int]) -> Tensor:
        kept: dict[int, Tensor] = {}
        for (site, slot), count in zip(self._slots[name], counts, strict=True):
            stays = kept.setdefault(slot.dim, torch.ones(wide.shape[slot.dim], dtype=torch.bool))
            stays[slot.entries(range(site.width + count, site.width + self.most[site.name]))] = False
        return narrow(wide, {dim: stays.nonzero()[:, 0] for dim, stays in kept.items()})

    def response(self, allocation: Mapping[str, int]) -> Response:
        """What the allocation does to the outputs, as `objective.response_change` measures it."""
        counts = {name: count for name, count in allocation.items() if count}
        if self._last is not None and self._last[0] == counts:
            return self._last[1]
        self._check(counts)
        distance = squared = 0.0
        outputs = self._outputs(counts)
        # Without any channel it is the victim; see `network` for what it may be rounded to.
        for changed, clean in zip(outputs if counts else self._clean, self._clean, strict=True):
            self._reader.comparable(clean, changed)
            squares = (changed - clean).square().sum(dim=1)
            distance += squares.sqrt().sum().item()
            squared += squares.sum().item()
        n = sum(map(len, self._clean))
        relative = squared / self._norm if self._norm else float("inf") if squared else 0.0
        self._last = counts, Response(distance / n, squared / n, relative)
        return self._last[1]

    def rebase(self, allocation: Mapping[str, int]) -> Response:
        """As `response`; candidates that come after start from this one, until it is rebased."""
        result = self.response(allocation)
        self._base_parts = dict(self._parts)
        self._base_state = self._last_state
        return result

    def responses(self, allocations: Sequence[Mapping[str, int]]) -> list[Response]:
        """Responses of many, run in the order in which each has most in common with the one before."""
        names = [site.name for site in self._layout.sites]
        vectors = [tuple(allocation.get(name, 0) for name in names) for allocation in allocations]
        found = {}
        for index in sorted(range(len(vectors)), key=lambda i: vectors[i]):
            found[index] = self.response(allocations[index])
        return [found[index] for index in range(len(vectors))]

    def _prepared(self, cache: int) -> Program | None:
        """The network's operators, if they give what the network does and their results can be kept."""
        touches = {name: [site.name for site, _ in slots] for name, slots in self._slots.items()}
        half = {name: -(-count // 2) for name, count in self.most.items()}
        try:
            with torch.no_grad():
                program = Program(self.network, self.most, self.batches[0], touches, self._reader.tensor)
                state = program.run(half, self._tensors(half), self.batches[:1], [])
        except UnfitError:
            return None
        size = sum(r.numel() * r.element_size() for r in _tensors_in(state.results))
        with torch.no_grad():
            right = self._reader.tensor(self.network(half), self.batches[0])
        same = torch.equal(right, program.outputs(state)[0])
        return program if same and size * len(self.batches) <= cache else None

    def _outputs(self, counts: dict[str, int]) -> list[Tensor]:
        """What the encrypted network makes of the images, by its operators where that can be done."""
        layout = self._layout_of(counts)
        with torch.no_grad():
            if self._program is None:
                network = self.network(counts)
                return [self._reader(network, batch, layout) for batch in self.batches]
            known = [state for state in (self._last_state, self._base_state) if state is not None]
            state = self._program.run(counts, self._tensors(counts), self.batches, known)
            self._last_state = state
            return [self._reader.values(out, layout) for out in self._program.outputs(state)]


def filled(
    original: Original, weights: Weights, rng: np.random.Generator, most: Mapping[str, int]
) -> tuple[dict[str, Tensor], Layout]:
    """The victim's widened tensors, with as many confusion channels as any allocation may have.

    Args:
        original: The victim.
        weights: Fills the channels.
        rng: The only source of randomness.
        most: How many for each site; they stand behind the real ones.

    Returns:
        The tensors that have confusion channels, by name, and what widened them.

    Raises:
        ConfigError: Invalid counts.
    """
    known = {site.name for site in original.sites}
    if not any(most.values()) or min(most.values()) < 0 or set(most) - known:
        raise ConfigError(f"expected counts >= 0 for sites of the network, some of them above 0, got {most}")
    layout = Layout.appended(original.sites, most)
    victim = tensors_of(original.model, original.sites)
    tensors = widened(victim, layout)
    seeds = {site.name: int(rng.integers(2**63)) for site in layout.sites}

    def make(neurons: Neurons) -> Sequence[Tensor]:
        own = np.random.default_rng(seeds[neurons.site.name])
        return weights_of(weights, neurons, own, own)

    fill(layout, victim, tensors, make)
    return tensors, layout


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
