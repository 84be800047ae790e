"""What every victim promises."""

from __future__ import annotations

from functools import cache

from deepenc.arena.build import Subject
from deepenc.arena.checks.base import Broken, Check
from deepenc.arena.duel import judged
from deepenc.victims.data.cache import cache_folder
from deepenc.victims.validation import validated
from deepenc.victims.victim import Victim, VictimSource


def victim_checks(source: VictimSource) -> list[Check]:
    """The checks for one victim; it is loaded, or trained, as for a run."""

    @cache
    def victim() -> Victim:
        return validated(source.load(cache_folder()))

    def same() -> None:
        again = source.load(cache_folder())
        if again.fingerprint != victim().fingerprint:
            raise Broken(
                "its fingerprint is another one each time; hash its weights and images, nothing else"
            )

    def better_than_chance() -> None:
        found, device = victim(), next(victim().model.parameters()).device
        score = judged(found.model, found, source.name, 1000, device)
        if "labels" not in found.task.offers:
            if not score.value:
                raise Broken(f"expected a network that does its task, got {score.measure} 0; see its weights")
            return
        # Three deviations above what guessing gets.
        labels = found.task.labels(found.judge.targets)
        chance = int(labels.bincount().max()) / len(labels)
        deviation = (chance * (1 - chance) / score.examples) ** 0.5
        if score.value <= chance + 3 * deviation:
            raise Broken(
                f"expected a network better than chance, got {score.value:.3f} on {score.examples} examples, "
                f"of which {chance:.3f} are of one class; are its weights loaded, its inputs prepared as in "
                "training?"
            )

    return [
        Check(
            "has parts that share nothing, labels that are classes, and a network that runs",
            lambda: (victim(), None)[1],
        ),
        Check("is the same victim each time", same),
        Check("is better than chance, and answers each image on its own", better_than_chance),
        Check("has sites", lambda: (Subject.of(victim()), None)[1]),
    ]
