"""What an attacker really got: accuracy of a network, and quality of suspicion scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor, nn

from deepenc.arena.outcomes import pack
from deepenc.arena.record import Detection, Score
from deepenc.errors import ClaimError
from deepenc.network.sites import Site
from deepenc.victims.victim import Images

log = logging.getLogger(__name__)

FEW = 10
"""Classes up to which the five highest say nothing worth counting."""

ALONE, COMPANY = 16, 256
"""Images, about, that are shown to a claimed network on their own, and at once."""
ROUNDING = 1e-2
"""Share of the spread of an image's outputs that another batch size may change: bfloat16 rounds by 4e-3."""

Scores = dict[str, np.ndarray]
"""Site name -> suspicion per channel, float64, ``(width,)``."""


def judge(
    network: nn.Module,
    images: Images,
    classes: int,
    *,
    who: str,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Score:
    """Count the images that a network classifies right, in eval mode and without gradients.

    An image whose outputs hold a NaN has no readable class: it counts as wrong, and `Score.unreadable`
    says how many there were, so that a network of NaNs is not mistaken for one that merely guesses badly.
    Of equal outputs the first class is named first, for top-1 and top-5 alike.

    Args:
        network: Maps ``(batch, ...)`` to ``(batch, classes)``.
        images: The judge's images, at least one.
        classes: Number of classes.
        who: The plugin that claims the network, for messages.
        device: Where to run.
        batch: Images at a time.

    Raises:
        ClaimError: The outputs are not a floating-point tensor of shape ``(batch, classes)``.
    """
    network = network.to(device).eval()
    unreadable = 0
    outcomes: list[np.ndarray] = []
    with torch.no_grad():
        for indices in torch.split(torch.arange(len(images)), batch):
            outputs = _answers(network, images, indices, classes, who, device)
            labels = images.labels[indices].to(device)
            nan = outputs.isnan().any(dim=1)
            order = outputs.argsort(dim=1, descending=True, stable=True)[:, :5]
            hits = (order == labels[:, None]) & ~nan[:, None]
            within = torch.stack([hits[:, 0], hits.any(dim=1)], dim=1)
            outcomes += list(within.double().cpu().numpy())
            unreadable += int(nan.sum())
    if unreadable:
        log.warning("%s: %d of %d outputs are NaN; they count as wrong", who, unreadable, len(images))
    first, fifth = np.mean(outcomes, axis=0)
    return Score(
        value=float(first),
        examples=len(images),
        unreadable=unreadable,
        further={"top-5": float(fifth)} if classes > FEW else {},
        outcomes=pack(outcomes if classes > FEW else [outcome[:1] for outcome in outcomes]),
    )


@contextmanager
def independent(
    network: nn.Module, images: Images, classes: int, *, who: str, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Judge inside a network whose answer to an image depends on that image alone.

    The judge's images are for measuring: a network that adapts to them, by the statistics of its batch or by
    what it was given before, is refused. Some images are shown on their own, before the network has seen any
    other, and at the end among others; the answers must agree, and the network be what it was.

    Args:
        network: As for `judge`.
        images: As for `judge`.
        classes: As for `judge`.
        who: As for `judge`.
        device: As for `judge`.

    Raises:
        ClaimError: Answers depend on other images, or the network changes while it is judged.
    """
    network = network.to(device).eval()
    before = _state(network)
    asked = torch.arange(0, len(images), max(1, len(images) // ALONE))
    others = torch.cat([asked, torch.arange(len(images))])[:COMPANY].flip(0)
    with torch.no_grad():
        alone = torch.cat([_answers(network, images, one, classes, who, device) for one in asked[:, None]])
        yield
        among = _answers(network, images, others, classes, who, device).flip(0)[: len(asked)]
    if differing := int((~_alike(alone, among)).sum()):
        raise ClaimError(
            f"attack {who!r}: expected a network whose answer to an image depends on that image alone; for "
            f"{differing} of {len(asked)} images it depends on the images beside or before it; set "
            "BatchNorm's statistics, and all that is random, before the network is claimed"
        )
    after = _state(network)
    if changed := sorted(n for n in before if n not in after or not _identical(before[n], after[n])):
        raise ClaimError(
            f"attack {who!r}: expected a network that stays as it is while it is judged; its forward changes "
            f"{changed[:5]}; change copies"
        )


def _answers(
    network: nn.Module, images: Images, indices: Tensor, classes: int, who: str, device: torch.device | str
) -> Tensor:
    """Outputs for some images, ``(indices, classes)``."""
    inputs = images.inputs[indices].to(device)  # indexing copies: the network may write to its input
    return _checked_outputs(network(inputs), (len(inputs), classes), who)


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in network.state_dict().items() if isinstance(t, Tensor)}


def _identical(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def _alike(first: Tensor, second: Tensor) -> Tensor:
    """Which rows of two ``(images, classes)`` are equal but for what rounding explains, ``(images,)``."""
    one, two = first.double().cpu(), second.double().cpu()
    finite = one.isfinite() & two.isfinite()
    plain = torch.where(finite, one, 0)
    tolerance = ROUNDING * (plain.amax(1) - plain.amin(1) + ROUNDING * plain.abs().amax(1))
    close = torch.where(finite, (one - two).abs() <= tolerance[:, None], one == two)
    return (close | (one.isnan() & two.isnan())).all(dim=1)


def _checked_outputs(outputs: object, shape: tuple[int, int], who: str) -> Tensor:
    got = f"{tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or tuple(outputs.shape) != shape or not outputs.is_floating_point():
        raise ClaimError(
            f"attack {who!r}: expected a network with outputs of shape (batch, classes) = {shape}, "
            f"floating point; got {got}; return a network that classifies as the victim does"
        )
    return outputs


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
