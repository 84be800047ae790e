"""What an attacker knows, holds, and may spend."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deepenc import trees
from deepenc.errors import ClaimError, OutOfBudget
from deepenc.tasks.task import Offer, Task

Budget = Literal[
    "labelled", "unlabelled", "samples", "steps", "key_fraction", "releases", "drift", "oracle", "trials"
]
"""What a curve can run over: the numbers of a threat model."""

Spent = Literal["samples", "steps", "queries", "trials"]
"""What a meter counts."""


class Threat(BaseModel):
    """A threat model, as data. The defense's algorithm and parameters are always known (Kerckhoffs).

    Attributes:
        name: How tables call it.
        architecture: Whether the attacker knows the victim's architecture, widths included.
        allocation: Whether the attacker knows ΔC per site (the paper's white box).
        key_fraction: Fraction of all confusion positions that the attacker knows, in [0, 1].
        labelled: Labelled examples the attacker holds.
        unlabelled: Unlabelled examples the attacker holds, none of them among the labelled.
        balanced: Whether the labelled examples are of all classes alike; else they are drawn at random.
        public_checkpoint: Whether the attacker has the public network that the victim was fine-tuned from.
        releases: Further releases of the same model, under other keys, that the attacker holds.
        drift: Optimiser steps by which the owner fine-tuned the model between one release and the next.
        oracle: Inputs that the authorised model answers.
        trials: Settings or guesses that the attacker may try out.
        point_of: Name of the threat model that this is a point of a curve of.
        samples: Samples the attacker's networks may process; None is without limit.
        steps: Optimiser steps the attacker may take; None is without limit.
        seconds: Wall time that an attack may take, in a run; it is stopped then. None is without limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    architecture: bool = True
    allocation: bool = True
    key_fraction: float = Field(0.0, ge=0.0, le=1.0)
    labelled: int = Field(0, ge=0)
    unlabelled: int = Field(0, ge=0)
    balanced: bool = False
    public_checkpoint: bool = False
    releases: int = Field(0, ge=0)
    drift: int = Field(0, ge=0)
    oracle: int = Field(0, ge=0)
    trials: int = Field(0, ge=0)
    point_of: str | None = None
    samples: int | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def family(self) -> str:
        """Name shared by all points of a curve: they are attacked with the same seeds and images."""
        return self.point_of or self.name

    def at(self, budget: Budget, value: float) -> Self:
        """The same threat model with another value of one budget: a point of a curve."""
        name = f"{self.name} {budget}={value:g}"  # `point` reads it
        fields = self.model_dump() | {budget: value, "name": name, "point_of": self.family}
        return type(self).model_validate(fields)


def point(name: str) -> tuple[str, str, float] | None:
    """What `Threat.at` put into a name: the family's name, the budget and its value; None for other names.

    >>> point("thief labelled=50")
    ('thief', 'labelled', 50.0)
    """
    family, _, last = name.rpartition(" ")
    budget, sign, value = last.partition("=")
    if not family or not sign or budget not in get_args(Budget):
        return None
    return family, budget, float(value)


class Needs(BaseModel):
    """The least that a threat model, and a task, must give for an attack to run at all.

    Attributes:
        offers: What is asked of the task (`deepenc.tasks.task.Offer`); the other fields are as in `Threat`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: bool = False
    allocation: bool = False
    key_fraction: float = 0.0
    labelled: int = 0
    unlabelled: int = 0
    public_checkpoint: bool = False
    releases: int = 0
    oracle: int = 0
    trials: int = 0
    offers: frozenset[Offer] = frozenset()

    def given_by_threats(self) -> dict[str, Any]:
        """The fields that a threat model has."""
        return self.model_dump(exclude={"offers"})

    def lacking(self, task: Task) -> list[str]:
        """What the task does not offer, in words."""
        words = {"logits": "scores of classes", "labels": "a class for each example", "answers": "answers"}
        return [words[offer] for offer in sorted(self.offers - task.offers)]

    def missing(self, threat: Threat) -> list[str]:
        """What the threat model does not give, in words; empty when it gives everything."""
        lacks = []
        for field in self.given_by_threats():
            needed, given = getattr(self, field), getattr(threat, field)
            if given < needed:
                lacks.append(field if needed is True else f"{field} >= {needed} (given {given})")
        return lacks

    def union(self, other: Needs) -> Needs:
        """What is needed to run both."""
        own, others = self.given_by_threats(), other.given_by_threats()
        fields = {field: max(value, others[field]) for field, value in own.items()}
        return Needs(**fields, offers=self.offers | other.offers)


@dataclasses.dataclass(eq=False)
class _Book:
    """What a meter has counted. Kept apart from it: a case leads to its meter, but not to the book."""

    threat: Threat
    spent: dict[Spent, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(get_args(Spent), 0))
    ceilings: list[dict[Spent, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    closed: bool = False


class Meter:
    """Counts what an attack spends, and stops it at its budget.

    The arena measures: samples are counted by hooks on the networks of the case (and on all copies made of
    them), steps by a hook on torch's optimisers. Whatever is read here cannot be written.

    Args:
        threat: Says what may be spent.
    """

    __slots__ = ("__weakref__",)

    def __init__(self, threat: Threat) -> None:
        _books[self] = _Book(threat.model_copy())

    def __deepcopy__(self, memo: dict[int, object]) -> Meter:
        """Releases of a case spend from one budget."""
        return self

    @property
    def samples(self) -> int:
        """Samples processed so far."""
        return _books[self].spent["samples"]

    @property
    def steps(self) -> int:
        """Optimiser steps so far."""
        return _books[self].spent["steps"]

    @property
    def queries(self) -> int:
        """Inputs that the authorised model answered."""
        return _books[self].spent["queries"]

    @property
    def trials(self) -> int:
        """Settings or guesses tried out."""
        return _books[self].spent["trials"]

    @property
    def seconds(self) -> float:
        """Wall time of the attack."""
        return _books[self].seconds

    def limit(self, what: Spent) -> int | None:
        """How much is allowed in all, by the threat model and by `limited`; None is without limit."""
        book = _books[self]
        threat = book.threat
        allowed: dict[Spent, int | None] = {
            "samples": threat.samples,
            "steps": threat.steps,
            "queries": threat.oracle,
            "trials": threat.trials,
        }
        limits = [allowed[what], *(ceiling.get(what) for ceiling in book.ceilings)]
        return min((limit for limit in limits if limit is not None), default=None)

    def left(self, what: Spent) -> int | None:
        """How much may still be spent; None is without limit."""
        limit = self.limit(what)
        return None if limit is None else limit - _books[self].spent[what]

    def charge(self, samples: int = 0, steps: int = 0, queries: int = 0, trials: int = 0) -> None:
        """Spend from the budget.

        Raises:
            OutOfBudget: More is asked for than the threat model or a `limited` around allows.
            ClaimError: Less than nothing is asked for.
        """
        book = _books[self]
        if book.closed:
            return
        asked: dict[Spent, int] = {"samples": samples, "steps": steps, "queries": queries, "trials": trials}
        for what, more in asked.items():
            if more < 0:
                raise ClaimError(f"expected a charge >= 0, got {more} {what}; what is spent is spent")
            left = self.left(what)
            if more and left is not None and more > left:
                raise OutOfBudget(
                    f"threat {book.threat.name!r} allows {self.limit(what)} {what}; "
                    f"the attack asked for {book.spent[what] + more}"
                )
        for what, more in asked.items():
            book.spent[what] += more

    @contextmanager
    def limited(self, **more: int | None) -> Iterator[Meter]:
        """Allow less inside: a part of the budget for a part of the attack; limits may be nested.

        Args:
            **more: ``samples``, ``steps``, ``queries`` or ``trials`` to the most that may still be spent
                inside; None sets no limit.
        """
        book = _books[self]
        spent = {what: count for what, count in book.spent.items() if more.get(what) is not None}
        ceiling = {what: count + int(more[what] or 0) for what, count in spent.items()}
        book.ceilings.append(ceiling)
        try:
            yield self
        finally:
            book.ceilings = [other for other in book.ceilings if other is not ceiling]

    def watch(self, network: nn.Module) -> nn.Module:
        """Count every sample that this network, or a deep copy of it, processes.

        Layers that are called on their own count too: together they have processed as many samples as the
        one that was given most.
        """
        inside = 0
        alone: Counter[str] = Counter()

        # Closures, not bound methods: deep copies of the network then share this very meter.
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal inside
            inside += 1
            self.charge(samples=_count(args, kwargs))

        def leave(*_: object) -> None:
            nonlocal inside
            inside -= 1

        def inner(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if inside:
                    return
                most = max(alone.values(), default=0)
                asked = alone[path] + _count(args, kwargs)
                self.charge(samples=max(0, asked - most))
                alone[path] = asked

            return count

        for path, module in network.named_modules():
            if path:
                module.register_forward_pre_hook(inner(path), with_kwargs=True)
        network.register_forward_pre_hook(enter, with_kwargs=True)
        network.register_forward_hook(leave, always_call=True)
        return network

    @contextmanager
    def running(self) -> Iterator[Meter]:
        """Count optimiser steps and wall time while the attack runs."""
        handle = register_optimizer_step_post_hook(lambda *_: self.charge(steps=1))
        started = time.perf_counter()
        try:
            yield self
        finally:
            handle.remove()
            _books[self].seconds += time.perf_counter() - started


_books: WeakKeyDictionary[Meter, _Book] = WeakKeyDictionary()


def close(meter: Meter) -> None:
    """For the arena, once the attack is over: what its networks do then, before the judge, costs nothing."""
    _books[meter].closed = True


def _count(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Samples in the arguments of a call: the examples of the first batch; 1 where there is none."""
    return next((count for given in (*args, *kwargs.values()) if (count := trees.size(given))), 1)
