"""A victim that is in memory already: what `deepenc.evaluate` was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from deepenc.errors import VictimError
from deepenc.victims.victim import Victim, VictimSource

_victims: dict[str, Victim] = {}


class Given(VictimSource):
    """A network and data from a program's memory; for `deepenc.evaluate` only."""

    name: ClassVar[str] = "given"

    called: str = "mine"
    """How tables call it."""

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.called

    def network(self, cache: Path) -> tuple[nn.Module, Any]:
        """See `VictimSource.network`."""
        victim = self.load(cache)
        return victim.model, victim.example

    def load(self, cache: Path) -> Victim:
        """See `VictimSource.load`."""
        if self.called not in _victims:
            raise VictimError(
                f"the network of the victim {self.called!r} was in the memory of another program; run that "
                "again"
            )
        return _victims[self.called]


def give(victim: Victim) -> Given:
    """Keep a victim in this process; its source."""
    _victims[victim.name] = victim
    return Given(called=victim.name)


def given() -> tuple[Victim, ...]:
    """All victims that were given to this process."""
    return tuple(_victims.values())
