"""What an attacker really got: the score of a network, and the quality of suspicion scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor, nn

from deepenc import trees
from deepenc.arena.outcomes import pack
from deepenc.arena.record import Detection, Score
from deepenc.errors import ClaimError
from deepenc.network.sites import Site
from deepenc.tasks.examples import Examples
from deepenc.tasks.task import Outcome, Task

log = logging.getLogger(__name__)

ALONE, COMPANY = 16, 256
"""Examples, about, that are shown to a claimed network on their own, and at once."""
ROUNDING = 1e-2
"""Share of the spread of an example's outputs that another batch size may change: bfloat16 rounds by 4e-3."""

Scores = dict[str, np.ndarray]
"""Site name -> suspicion per channel, float64, ``(width,)``."""


def judge(
    network: nn.Module,
    examples: Examples,
    task: Task,
    *,
    who: str,
    device: torch.device | str = "cpu",
    batch: int | None = None,
) -> Score:
    """What a network is worth at a task, in eval mode and without gradients.

    An example for which the outputs hold a NaN has no readable answer: it counts as wrong, and
    `Score.unreadable` says how many there were, so that a network of NaNs is not mistaken for one that merely
    guesses badly.

    Args:
        network: Does the task.
        examples: The judge's, at least one.
        task: The task.
        who: The plugin that claims the network, for messages.
        device: Where to run.
        batch: Examples at a time; default: as many as the task says.

    Raises:
        ClaimError: The outputs do not have the task's form.
    """
    network = network.to(device).eval()
    unreadable = 0
    outcomes: list[Outcome] = []
    with torch.no_grad():
        for inputs, targets in examples.to(device).batches(batch or task.at_once):
            outputs = _answers(network, inputs, task, who)
            outcomes += task.outcomes(outputs, targets)
            unreadable += sum(task.unreadable(outputs))
    if unreadable:
        log.warning("%s: %d of %d outputs are NaN; they count as wrong", who, unreadable, len(examples))
    worth = task.worth(outcomes)
    return Score(
        measure=task.measure,
        value=worth.value,
        examples=len(examples),
        unreadable=unreadable,
        further=worth.further,
        outcomes=pack(outcomes),
    )


@contextmanager
def independent(
    network: nn.Module, examples: Examples, task: Task, *, who: str, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Judge inside a network whose answer to an example depends on that example alone.

    The judge's examples are for measuring: a network that adapts to them, by the statistics of its batch or
    by what it was given before, is refused. Some examples are shown on their own, before the network has seen
    any other, and at the end among others; the answers must agree, and the network be what it was.

    Args:
        network: As for `judge`.
        examples: As for `judge`.
        task: As for `judge`.
        who: As for `judge`.
        device: As for `judge`.

    Raises:
        ClaimError: Answers depend on other examples, or the network changes while it is judged.
    """
    network = network.to(device).eval()
    before = _state(network)
    asked = torch.arange(0, len(examples), max(1, len(examples) // ALONE))
    others = torch.cat([asked, torch.arange(len(examples))])[
        : min(COMPANY, max(task.at_once, 2 * len(asked)))
    ].flip(0)
    there = examples.to(device)

    def ask(index: Tensor) -> Any:
        return _answers(network, there.batch(index).inputs, task, who)

    with torch.no_grad():
        alone = trees.join([ask(one) for one in asked[:, None]])
        yield
        among = trees.take(ask(others), torch.arange(len(others) - 1, len(others) - 1 - len(asked), -1))
    if differing := task.alike(alone, among, ROUNDING).count(False):
        raise ClaimError(
            f"attack {who!r}: expected a network whose answer to an example depends on that example alone; "
            f"for {differing} of {len(asked)} examples it depends on the examples beside or before it; set "
            "BatchNorm's statistics, and all that is random, before the network is claimed"
        )
    after = _state(network)
    if changed := sorted(n for n in before if n not in after or not _identical(before[n], after[n])):
        raise ClaimError(
            f"attack {who!r}: expected a network that stays as it is while it is judged; its forward changes "
            f"{changed[:5]}; change copies"
        )


def _answers(network: nn.Module, inputs: Any, task: Task, who: str) -> Any:
    """Outputs for a batch that is the network's own, which it may write to."""
    outputs = task.run(network, inputs)
    if wrong := task.complaint(outputs, inputs):
        raise ClaimError(f"attack {who!r}: {wrong}; return a network that answers as the victim does")
    return outputs


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in network.state_dict().items() if isinstance(t, Tensor)}


def _identical(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def checked_scores(scores: Mapping[str, Tensor], sites: Sequence[Site], who: str) -> Scores:
    """The claimed scores as arrays, once their form is right.

    Args:
        scores: Site name to suspicion per channel, ``(width,)``.
        sites: Sites of the encrypted network.
        who: The plugin that claims them, for messages.

    Raises:
        ClaimError: An unknown site, a wrong shape, or a value that is not finite.
    """
    if not isinstance(scores, Mapping):
        raise ClaimError(f"attack {who!r}: expected scores by site name, got {type(scores).__name__}")
    widths = {site.name: site.width for site in sites}
    if strangers := sorted(set(scores) - set(widths)):
        raise ClaimError(f"attack {who!r}: scores name sites {strangers}; known: {sorted(widths)}")
    checked = {}
    for name, values in scores.items():
        if not isinstance(values, Tensor) or tuple(values.shape) != (widths[name],):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ClaimError(
                f"attack {who!r}, site {name!r}: expected a tensor of scores of shape ({widths[name]},), got "
                f"{got}; give one score per channel"
            )
        array = values.detach().to("cpu", torch.float64).numpy()
        if not np.isfinite(array).all():
            raise ClaimError(
                f"attack {who!r}, site {name!r}: expected finite scores, got "
                f"{int((~np.isfinite(array)).sum())} that are not; clip or drop them before returning"
            )
        checked[name] = array
    return checked


def detection(
    scores: Scores, sites: Sequence[Site], positions: Mapping[str, Sequence[int]]
) -> Detection | None:
    """How well scores separate confusion channels from real ones.

    Only sites that have confusion channels count, and attacks need not make their sites comparable: the AUC
    compares channels of one site only; for the other curves a score becomes its rank from the top of its
    site, in multiples of the site's ΔC, so that whoever is right at every site is right in the pool. A site
    that the scores leave out is a constant score.

    Args:
        scores: From `checked_scores`.
        sites: Sites of the encrypted network.
        positions: Confusion positions per site.

    Returns:
        None where the network has no confusion channel.
    """
    ranks, truth = [], []
    wins, pairs = 0.0, 0
    left, total = 0.0, 0.0
    found = []
    for site in sites:
        count = len(positions.get(site.name, ()))
        if not count:
            continue
        values = scores.get(site.name, np.zeros(site.width))
        inserted = np.zeros(site.width, dtype=bool)
        inserted[list(positions[site.name])] = True
        tried = int((values >= values[inserted].min()).sum())
        if tried == count:
            found.append(site.name)
        left += _log2_comb(tried, count)
        total += _log2_comb(site.width, count)
        wins += rankdata(values)[inserted].sum() - count * (count + 1) / 2  # Mann and Whitney's U
        pairs += count * (site.width - count)
        ranks.append((0.5 - rankdata(-values)) / count)
        truth.append(inserted)
    if not truth:
        return None
    rank, label = np.concatenate(ranks), np.concatenate(truth)
    false, true, _ = roc_curve(label, rank, drop_intermediate=False)
    return Detection(
        auc=float(wins / pairs),
        average_precision=min(1.0, float(average_precision_score(label, rank))),  # it rounds past 1
        tpr=float(true[false <= 0.01].max()),
        exact_sites=len(found),
        found=tuple(found),
        sites=len(truth),
        bits_left=left,
        bits=total,
    )


def _log2_comb(n: int, k: int) -> float:
    return math.log2(math.comb(n, k))


def most_suspect(scores: Scores, allocation: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The ΔC most suspect channels of every site that was scored, ascending.

    Sites without scores keep all their channels: nothing there is suspected. Among equal scores the first
    channels are taken, which tells nothing, since positions are drawn at random.
    """
    chosen = {}
    for name, values in scores.items():
        count = allocation.get(name, 0)
        order = np.argsort(-values, kind="stable")[:count]
        chosen[name] = tuple(sorted(int(channel) for channel in order))
    return chosen
