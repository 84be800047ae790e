"""Prove sites by probing: insert channels that go nowhere, and see that nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from deepenc.errors import TraceError
from deepenc.network.calling import Arguments, recording, removed
from deepenc.network.guard import foreign, guarded
from deepenc.network.proving.probe import probe
from deepenc.network.proving.reference import Expected, pristine, telling
from deepenc.network.proving.settings import Completion, home_of
from deepenc.network.proving.values import with_values
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.network.tracing.tracer import Traced

Refuted = list[tuple[Site, str]]


def prove(
    model: nn.Module, example: Any, sites: Sequence[Site], traced: Traced | None = None
) -> tuple[list[Site], Refuted]:
    """Divide sites into those that a probe insertion confirms and those that it refutes.

    All sites are probed at once, each with its own number of channels (1 to 3), so that widths that
    depend on one another show. A probe that fails is halved until the sites at fault are single.

    Args:
        model: The network; untouched.
        example: Its example input.
        sites: Candidates.
        traced: What is known of the network from following it.

    Returns:
        The proved sites, with the settings that they need, and the others with reasons.

    Raises:
        TraceError: The network proves nothing, or cannot be copied exactly.
    """
    if not sites:
        return [], []
    with guarded(model), foreign(f"{type(model).__name__} does not run as a copy with other weights"):
        proved, refuted = _Proof(model, example, traced).divide(sites)
        if not any(tensor.is_meta for tensor in named_tensors(model).values()):
            return proved, refuted
        reasons = with_values(model, example, proved, _verdict)
        refuted += [(site, reason) for site in proved if (reason := reasons[site.name]) is not None]
        return [site for site in proved if reasons[site.name] is None], refuted


def _verdict(model: nn.Module, example: Any, sites: Sequence[Site]) -> dict[str, str | None]:
    with foreign(f"{type(model).__name__} does not run"):
        _, refuted = _Proof(model, example, None).divide(sites)
    return dict.fromkeys((site.name for site in sites), None) | {site.name: why for site, why in refuted}


class _Proof:
    """Probes of one network.

    Attributes:
        refuted: Sites that are none, with reasons.
    """

    def __init__(self, model: nn.Module, example: Any, traced: Traced | None) -> None:
        self.refuted: Refuted = []
        self._traced = traced
        self._example = example
        self._own = model
        self._model = telling(model)
        self._model.eval()
        self._counts: dict[str, int] = {}

    def divide(self, sites: Sequence[Site]) -> tuple[list[Site], Refuted]:
        heads = [site for site in sites if site.contracted]
        seen: dict[str, list[Arguments]] = {home_of(site): [] for site in heads}
        self._expected = self._reference(seen)
        self._counts = {site.name: 1 + index % 3 for index, site in enumerate(sites)}
        completion = Completion(self._model, seen)
        proved = self._completed(sites, completion.guess)
        before = len(self.refuted)
        if proved and (reason := self._probe(proved)) is not None:
            if heads:  # not all of a class are alike
                self.refuted.clear()
                proved = self._completed(sites, completion.of)
                before = len(self.refuted)
                reason = None
            proved = self._confirmed(proved, reason)
        if len(self.refuted) > before and proved and self._probe(proved) is not None:
            # Each alone is right, together they are not: no choice among them can be defended.
            self.refuted += [
                (site, "it is right alone, but not together with other sites") for site in proved
            ]
            proved = []
        if self.refuted and not proved and not self._expected.agrees(self._again()):
            raise TraceError(
                "the network gives other outputs each time, in eval mode too, and so proves nothing; take "
                "the randomness out of its forward pass"
            )
        return proved, self.refuted

    def _completed(self, sites: Sequence[Site], complete: Callable[[Site], Site | str]) -> list[Site]:
        candidates: list[Site] = []
        for site in sites:
            result = complete(site) if site.contracted else site
            if isinstance(result, str):
                self.refuted.append((site, result))
            else:
                candidates.append(result)
        return candidates

    def _reference(self, seen: dict[str, list[Arguments]]) -> Expected:
        """What the network does with telling weights; what its heads are given is noted on the way."""
        copied = pristine(self._model)
        with removed(list(recording(copied, seen))):
            expected = Expected.of(copied, self._example, self._traced.left if self._traced else None)
        del copied
        if any(tensor.is_meta for tensor in expected.outputs):
            return expected
        own = (
            self._traced.outputs if self._traced else Expected.of(pristine(self._own), self._example).outputs
        )
        expected = expected.moved(own)
        if not expected.tells:
            raise TraceError(
                "the network's outputs on the example are not finite, or do not depend on its weights, and "
                "so prove nothing; give another example input, repair the weights, or look in a submodule "
                "alone, with a scope"
            )
        return expected

    def _again(self) -> list[Tensor]:
        return Expected.of(pristine(self._model), self._example).outputs

    def _probe(self, part: Sequence[Site]) -> str | None:
        return probe(self._model, self._example, part, self._counts, self._expected)

    def _confirmed(self, part: Sequence[Site], reason: str | None = None) -> list[Site]:
        """Those of the sites that stand; `reason` is why not all of them do together, where that is known."""
        if not part or (reason := reason or self._probe(part)) is None:
            return list(part)
        if len(part) == 1:
            self.refuted.append((part[0], reason))
            return []
        half = len(part) // 2
        return self._confirmed(part[:half]) + self._confirmed(part[half:])
