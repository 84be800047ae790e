"""A classifier that learnt on encryptions of the attacker's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

from deepenc.arena.case import Attack, Case, Claim, Weakness
from deepenc.arena.kit.shadows import Own, Rows, Sample, described, side_by_side, width
from deepenc.encryption.defense import Defense
from deepenc.errors import ClaimError, DeepencError
from deepenc.network.find import find_sites
from deepenc.network.structure import named_tensors
from deepenc.seeds import derive
from deepenc.tasks.examples import joined
from deepenc.victims.data.cache import cache_folder
from deepenc.victims.victim import VictimSource

FAMILY = ("paper-samp", "paper-init", "paper-mixed")  # where the victim's own defense cannot be run
Scores = dict[str, NDArray[np.float64]]


class Shadow(Attack):
    """Encrypt own networks with the known defense, learn to tell their confusion channels, apply that.

    The classifier sees the statistics of weights of `deepenc.analysis.features`, in robust z-scores within
    each site, so that it carries over to networks of other sizes. A defense whose code is not at hand is
    stood in for by the paper's three. Under the null defense, known to insert nothing, nothing is suspected.
    """

    name: ClassVar[str] = "shadow"
    detects: ClassVar[Weakness | None] = "noise"

    networks: tuple[VictimSource, ...] = ()
    """The attacker's own networks; default: the stolen one, encrypted once more."""
    defenses: tuple[Defense, ...] = ()
    """Defenses to learn from; default: the victim's own. Others show what carries over from one strategy
    to another; give `networks` then, for in the stolen one the victim's strategy passes for real."""
    encryptions: int = Field(4, ge=1)
    """Keys for each network and defense."""
    classifier: Literal["forest", "boosting"] = "forest"
    """Random forest, or histogram gradient boosting."""
    trees: int = Field(300, ge=1)
    """Trees of the classifier."""
    folds: int = Field(4, ge=2)
    """Parts of the stolen network's channels, where it is the attacker's own network too: each part is
    scored by a classifier that learnt on the others, since not all that then counts as real is."""
    features: tuple[str, ...] | None = None
    """Statistics to use, by name; default: all."""

    def attack(self, case: Case) -> Claim:
        """See `Attack.attack`."""
        defenses = [d for d in self.defenses or known_defenses(case.defense) if d.protects]
        if not defenses:
            return Claim(scores={site.name: torch.zeros(site.width) for site in case.sites})
        samples = [
            s
            for number, own in enumerate(self._own(case))
            for d in defenses
            for s in self._encryptions(case, own, d, number)
        ]
        victim = described(named_tensors(case.encrypted), case.sites, self.features)
        if self.networks:
            scores = self._learn(samples, victim, case.seed)
        else:
            scores = self._cross(samples, victim, case.seed)
        return Claim(scores={name: torch.from_numpy(score) for name, score in scores.items()})

    def _own(self, case: Case) -> Iterator[Own]:
        if not self.networks:
            yield Own(case.encrypted, case.example, case.sites, case.task)
        for source in self.networks:
            network, example = source.network(cache_folder())
            yield Own(network, example, tuple(find_sites(network, example)), case.task)

    def _encryptions(self, case: Case, own: Own, defense: Defense, number: int) -> Iterator[Sample]:
        """Every site of every encryption of one network."""
        data = joined([case.labelled, case.unlabelled])
        for key in range(self.encryptions):
            secret = derive(case.seed.to_bytes(32), "shadow", key, number, defense.name)
            yield from own.encrypted(defense, secret, data, self.features)

    def _cross(self, samples: Sequence[Sample], victim: Mapping[str, Rows], seed: int) -> Scores:
        """Score each channel by a classifier that did not learn that it is real."""
        rng = np.random.default_rng(seed)
        folds = {name: rng.permutation(width(rows)) % self.folds for name, rows in victim.items()}
        scores = {name: np.zeros(len(fold)) for name, fold in folds.items()}
        for number in range(self.folds):
            rest = [sample.without(folds[sample.site] == number) for sample in samples]
            for name, score in self._learn(rest, victim, seed).items():
                scores[name][folds[name] == number] = score[folds[name] == number]
        return scores

    def _learn(self, samples: Sequence[Sample], victim: Mapping[str, Rows], seed: int) -> Scores:
        """How probable it is, after the samples, that the victim's channels are inserted."""
        columns = sorted(set().union(*(sample.rows for sample in samples)))
        model = self._model(seed % 2**32)
        model.fit(
            np.concatenate([side_by_side(sample.rows, columns) for sample in samples]),
            np.concatenate([sample.inserted for sample in samples]),
        )
        column = model.classes_.tolist().index(True)
        return {n: model.predict_proba(side_by_side(rows, columns))[:, column] for n, rows in victim.items()}

    def _model(self, state: int) -> Any:
        if self.classifier == "forest":
            return RandomForestClassifier(self.trees, class_weight="balanced", random_state=state)
        return HistGradientBoostingClassifier(
            max_iter=self.trees, class_weight="balanced", random_state=state
        )


def known_defenses(spec: Mapping[str, Any]) -> tuple[Defense, ...]:
    """The defense that the attacker was told of, or, where its code is not at hand, stand-ins.

    Raises:
        ClaimError: The stand-ins are not at hand either.
    """
    try:
        return (Defense.model_validate(spec),)
    except (DeepencError, ValidationError):
        pass  # a plugin of the user's own that this process has not loaded
    try:
        return tuple(Defense.of(name) for name in FAMILY)
    except DeepencError as error:
        raise ClaimError(
            f"shadow cannot run the defense {spec.get('name')!r} to learn from it, nor the paper's: {error}; "
            "give `defenses`"
        ) from error
