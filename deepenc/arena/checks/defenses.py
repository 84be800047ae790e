"""What every placement, weights strategy and hardening promises, and every defense made of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepenc.arena.build import Encryption, build_case
from deepenc.arena.checks.base import Broken, Check, differing, snapshot, watched
from deepenc.arena.checks.bounds import check_ends
from deepenc.arena.checks.pry import pry
from deepenc.arena.checks.tiny import host_defense, tiny_subject
from deepenc.arena.metrics import checked_scores, detection, most_suspect
from deepenc.arena.threat import Threat, close
from deepenc.encryption.defense import Defense, Hardening, Neurons, Original, Placement, Weights
from deepenc.encryption.encrypt import decrypt, encrypt
from deepenc.encryption.tensors import tensors_of
from deepenc.network.surgery import Layout

KEYS = 3
MOST = 16
"""Confusion channels at a site, as a multiple of its width, that a placement may ask for."""
PRYING = Threat(name="prying", labelled=128, unlabelled=64)


def placement_checks(placement: Placement) -> list[Check]:
    """The checks for one placement."""
    blame = f"placement {placement.name!r}"

    def place() -> dict[str, int]:
        return dict(placement.place(_original(), np.random.default_rng(7)))

    def counts() -> None:
        widths = {site.name: site.width for site in _original().sites}
        for name, count in place().items():
            if name not in widths:
                raise Broken(f"it names site {name!r}; known: {sorted(widths)}")
            if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
                raise Broken(f"site {name!r}: expected an integer >= 0, got {count!r}")
            if count > MOST * widths[name]:
                raise Broken(
                    f"site {name!r}: {count} confusion channels beside {widths[name]} real ones; expected at "
                    f"most {MOST} times as many"
                )

    def after(check: Check) -> Check:
        """The check, once the counts are such that it can be made."""

        def body() -> None:
            counts()
            check.body()

        return Check(check.name, body)

    def deterministic() -> None:
        if place() != place():
            raise Broken("two runs with equal generators differ; draw from `rng` only")

    return [
        Check("gives counts >= 0 for sites that there are", counts),
        Check("does the same with an equal generator", deterministic),
        _untouched(blame, place),
        *map(after, defense_checks(host_defense(placement=placement))),
        after(Check("runs at the bounds of its parameters", lambda: check_ends(placement, _place))),
    ]


def weights_checks(weights: Weights) -> list[Check]:
    """The checks for one weights strategy."""
    blame = f"weights {weights.name!r}"

    def fill() -> list[Sequence[Tensor]]:
        rng = np.random.default_rng(7)
        return [weights.fill(neurons, rng, rng) for neurons in _neurons()]

    def form() -> None:
        for neurons, values in zip(_neurons(), fill(), strict=True):
            if len(values) != len(neurons.gaps):
                raise Broken(f"expected one tensor for each of {len(neurons.gaps)} gaps, got {len(values)}")
            for gap, value in zip(neurons.gaps, values, strict=True):
                if tuple(value.shape) != gap.shape:
                    raise Broken(
                        f"{gap.slot.tensor}: expected shape {gap.shape}, got {tuple(value.shape)}; "
                        "return values of `gap.shape`"
                    )
                if not torch.isfinite(value).all():
                    raise Broken(f"{gap.slot.tensor}: expected finite values")

    def deterministic() -> None:
        pairs = zip(fill(), fill(), strict=True)
        if not all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)):
            raise Broken("two runs with equal generators differ; draw from `rng` only")

    return [
        Check("gives finite values of the shapes that are asked for", form),
        Check("does the same with an equal generator", deterministic),
        _untouched(blame, fill),
        *defense_checks(host_defense(weights=weights)),
        Check("runs at the bounds of its parameters", lambda: check_ends(weights, _fill)),
    ]


def hardening_checks(hardening: Hardening) -> list[Check]:
    """The checks for one hardening; that it changes confusion entries only is checked at every use."""
    defense = host_defense(hardening=hardening)
    blame = f"hardening {hardening.name!r}"
    return [
        _untouched(blame, lambda: _encrypt(defense)),
        *defense_checks(defense),
        Check("runs at the bounds of its parameters", lambda: check_ends(hardening, _harden)),
    ]


def defense_checks(defense: Defense) -> list[Check]:
    """The checks for a whole defense."""
    return [
        Check("gives the victim back, bit for bit", lambda: _reversible(defense)),
        Check("makes the same network from the same secret", lambda: _repeatable(defense)),
        Check("leaks nothing to an inspection of the case", lambda: _check_no_leak(defense)),
    ]


def _original() -> Original:
    subject = tiny_subject()
    victim = subject.victim
    return Original(victim.model, subject.sites, victim.example, victim.defender, victim.task)


def _neurons() -> list[Neurons]:
    """Two confusion channels at every site, about to be filled."""
    original = _original()
    state = tensors_of(original.model, original.sites)
    layout = Layout(original.sites, {site.name: (0, 3) for site in original.sites})
    return [Neurons.of(site, layout, state) for site in original.sites]


def _place(placement: Placement) -> None:
    placement.place(_original(), np.random.default_rng(7))


def _fill(weights: Weights) -> None:
    _encrypt(host_defense(weights=weights))


def _harden(hardening: Hardening) -> None:
    _encrypt(host_defense(hardening=hardening))


def _secret(index: int) -> bytes:
    return hashlib.sha256(f"contract of defenses {index}".encode()).digest()


def _encrypt(defense: Defense, index: int = 0) -> Any:
    original = _original()
    return encrypt(
        original.model,
        original.example,
        defense,
        secret=_secret(index),
        sites=original.sites,
        data=original.data,
        task=original.task,
    )


def _untouched(blame: str, act: Callable[[], object]) -> Check:
    def body() -> None:
        model = _original().model
        before = snapshot(model)
        with watched() as disturbances:
            act()
        if disturbances:
            raise Broken(f"{blame} {'; '.join(disturbances)}")
        if changed := differing(before, snapshot(model)):
            # The tiny network serves other checks too: do not let them see the damage.
            model.load_state_dict(before)
            raise Broken(f"it changed the victim's tensors {changed[:5]}; work on copies")

    return Check("leaves the victim, the global generators and the grad mode as they were", body)


def _reversible(defense: Defense) -> None:
    network, key = _encrypt(defense)
    if changed := differing(snapshot(decrypt(network, key)), snapshot(_original().model)):
        raise Broken(f"after decryption {changed[:5]} differ from the victim's")


def _repeatable(defense: Defense) -> None:
    (first, key), (second, other) = _encrypt(defense), _encrypt(defense)
    if key != other or (changed := differing(snapshot(first), snapshot(second))):
        raise Broken(f"one secret made two networks ({changed[:5] if key == other else 'two keys'})")


def _check_no_leak(defense: Defense) -> None:
    """Over several keys: no finding, detection within chance, accuracy not above the null attack's."""
    subject = tiny_subject()
    images = subject.victim.judge
    scores, truth, gained = [], [], []
    for index in range(KEYS):
        encryption = Encryption.of(subject, defense, _secret(index))
        case = build_case(encryption, PRYING, 1000 + index, 2000 + index, torch.device("cpu"))
        found = pry(case)
        if found.notes:
            raise Broken(f"a prying attacker finds: {'; '.join(found.notes[:5])}")
        array = checked_scores(found.scores, case.sites, "pry")
        measured = detection(array, case.sites, encryption.key.positions)
        if measured is None:
            continue
        scores.append(measured.auc)
        inserted = sum(len(chosen) for chosen in encryption.key.positions.values())
        truth.append((inserted, sum(site.width for site in case.sites) - inserted))
        suspects = most_suspect(array, encryption.key.allocation) if found.anything else {}
        close(case.meter)
        with torch.no_grad():
            kept = case.encrypted(images.inputs).argmax(1) == images.targets
            pried = case.remove(suspects).eval()(images.inputs).argmax(1) == images.targets
        gained.append(float(pried.double().mean() - kept.double().mean()))
    if not scores:
        return
    chance = _chance(truth)
    if np.mean(scores) > 0.5 + chance:
        raise Broken(f"prying has AUC {np.mean(scores):.3f}, chance is up to {0.5 + chance:.3f}")
    margin = 3 * math.sqrt(0.5 / (len(images) * len(gained)))
    if np.mean(gained) > margin:
        raise Broken(f"prying gains {np.mean(gained):.3f} of accuracy over doing nothing")


def _chance(counts: Sequence[tuple[int, int]]) -> float:
    """Half width of the 99 % interval of the mean AUC of random scores (Mann and Whitney 1947)."""
    variances = [(m + n + 1) / (12 * m * n) for m, n in counts]
    return 2.576 * math.sqrt(sum(variances)) / len(variances)
