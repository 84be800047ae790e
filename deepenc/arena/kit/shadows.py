"""Encryptions that an attacker makes himself, as examples to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from deepenc.analysis.features import features, standardised
from deepenc.encryption.defense import Defense
from deepenc.encryption.encrypt import encrypt
from deepenc.network.sites import Site
from deepenc.network.structure import named_tensors
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Task

Rows = dict[str, NDArray[np.float64]]
"""Name of a feature -> its values, one a channel."""


@dataclass(frozen=True, eq=False)
class Own:
    """A network of the attacker's, about to be encrypted by him.

    Attributes:
        network: The network.
        example: An example input.
        sites: The network's sites.
        task: What it is for.
    """

    network: nn.Module
    example: Any
    sites: tuple[Site, ...]
    task: Task

    def encrypted(
        self, defense: Defense, secret: bytes, data: Examples | None, names: Sequence[str] | None = None
    ) -> Iterator[Sample]:
        """What the sites look like under one key.

        Args:
            defense: One that inserts something.
            secret: 32 bytes.
            data: Examples, for a defense that wants some; None or empty where there are none.
            names: Features wanted, as for `deepenc.analysis.features.features`.
        """
        if data is not None:
            data = data.to(next(self.network.parameters()).device) if len(data) else None
        network, key = encrypt(
            self.network, self.example, defense, secret=secret, sites=self.sites, data=data, task=self.task
        )
        sites = key.layout().widened_sites()
        for site, rows in described(named_tensors(network), sites, names).items():
            inserted = np.zeros(width(rows), dtype=bool)
            inserted[list(key.positions.get(site, ()))] = True
            yield Sample(site, rows, inserted)


@dataclass(frozen=True, eq=False)
class Sample:
    """One site of an encryption.

    Attributes:
        site: Its name.
        rows: The features of its channels.
        inserted: Which of them were inserted, ``(channels,)``.
    """

    site: str
    rows: Rows
    inserted: NDArray[np.bool_]

    def without(self, original: NDArray[np.bool_]) -> Sample:
        """The sample without some of the channels that were there before, given by a mask over these."""
        keep = self.inserted.copy()
        keep[~self.inserted] = ~original
        rows = {name: values[keep] for name, values in self.rows.items()}
        return Sample(self.site, rows, self.inserted[keep])


def described(
    tensors: Mapping[str, Tensor], sites: Sequence[Site], names: Sequence[str] | None = None
) -> dict[str, Rows]:
    """Features of every site that has any, in robust z-scores within the site.

    Args:
        tensors: Of a network, by name.
        sites: Its sites.
        names: As for `deepenc.analysis.features.features`.
    """
    return {
        name: dict(zip(table.names, standardised(table).numpy().T, strict=True))
        for name, table in features(tensors, sites, names).items()
        if table.names
    }


def width(rows: Rows) -> int:
    """Number of channels."""
    return len(next(iter(rows.values())))


def side_by_side(rows: Rows, columns: Sequence[str]) -> NDArray[np.float64]:
    """Features as ``(channels, columns)``; one that a site lacks is 0, the typical value."""
    return np.stack([rows.get(column, np.zeros(width(rows))) for column in columns], axis=1)
