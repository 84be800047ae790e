"""Influence: what a channel moves behind it, worked out by hand, and on planted harm."""

from __future__ import annotations

import torch

from attacks.influence import Influence, missed
from deepenc.analysis.batchnorm import Moments
from deepenc.analysis.consistency import Evidence
from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.planted import planted_defense, planted_subject
from deepenc.arena.metrics import checked_scores, detection
from deepenc.arena.threat import Threat
from deepenc.encryption.defense import Defense
from defenses.hardening.withhold import Withhold

CPU = torch.device("cpu")


def test_by_hand() -> None:
    """One row that hears three channels of constant mean 0, 1 and 3, each with variance 1."""
    means = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)  # the last is what comes from elsewhere
    second = torch.outer(means, means) + torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    nonsense = Moments(torch.tensor([100.0]), torch.tensor([0.01]))
    evidence = Evidence(
        first=means[None], second=second[None], bias=torch.zeros(1), stored=nonsense,
        own=torch.full((3,), 7.0, dtype=torch.float64), eps=torch.zeros(1, dtype=torch.float64),
    )  # fmt: skip
    # Together the row has mean 4 and variance 3; without a channel, variance 2 and 0, 1 or 3 less of mean.
    log = torch.log(torch.tensor(2 / 3, dtype=torch.float64))
    expected = torch.log1p(torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64) / 3 + log**2 / 4)
    assert torch.allclose(missed(evidence), expected)


def test_harm_is_heard_though_statistics_are_withheld() -> None:
    plain = planted_defense("loud")
    withheld = Defense(name="t", placement=plain.placement, weights=plain.weights, hardening=(Withhold(),))
    for defense in (plain, withheld):
        encryption = Encryption.of(planted_subject(64), defense, bytes([1]) * 32)
        case = build_case(encryption, Threat(name="t", unlabelled=64), 3, 4, CPU)
        scores = checked_scores(Influence().attack(case).scores or {}, case.sites, "influence")
        heard = {name: scores[name] for name in ("conv1", "conv2")}  # behind conv3 comes no BatchNorm
        sites = [site for site in case.sites if site.name in heard]
        found = detection(heard, sites, encryption.key.positions)
        assert found is not None
        assert found.auc > 0.95
