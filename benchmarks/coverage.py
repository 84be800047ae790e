"""How often the printed 95 % intervals cover the truth: simulated runs of which the truth is known.

Every kind of data is drawn many times, with 2 to 20 keys, and goes through the function that makes the
printed interval. The tables give, for each number of keys, the share of printed intervals that hold the
truth, their median width, and how many were printed. With `--records RUN`, a run of many keys is a
population, too: keys and examples are drawn from it, with replacement, together with the references that its
advantages need. The last table compares two defenses that are one and the same.

    python benchmarks/coverage.py [--simulations 2000] [--examples 600] [--records RUN ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import expit

from deepenc.arena.estimates.comparison import LEVEL, compared
from deepenc.arena.estimates.estimate import Estimate, estimated
from deepenc.arena.estimates.references import gained, mean_advantage, row
from deepenc.arena.outcomes import pack
from deepenc.arena.record import Record
from deepenc.arena.run.store import Store
from deepenc.report.format import markdown_table

KEYS = (2, 3, 5, 10, 20)
MANY = 400_000
"""Draws from which a truth is computed where it has no closed form."""
FEW = 0.05
"""Share of printed intervals below which their coverage says nothing."""
NULL = 500
"""Comparisons of a defense with itself, at most."""
HARD = 1.5
"""Standard deviation of the examples' hardness, as a shift of the logit, for the advantages."""

Array = NDArray[np.float64]
Draw = Callable[[int, int, Generator], Array]
"""Keys and examples to a table ``(keys, examples)``, or to values ``(keys,)``."""


@dataclass(frozen=True)
class Kind:
    """A kind of data, and the truth about its mean."""

    name: str
    draw: Callable[[int, int, Generator], Estimate | None]
    truth: float


@dataclass(frozen=True)
class Row:
    """What became of the intervals of one kind at one number of keys; shares in [0, 1]."""

    kind: str
    keys: int
    coverage: float | None
    width: float | None
    printed: float


def outcomes(chances: Array, rng: Generator) -> Array:
    """Right or wrong, with the chances given."""
    return (rng.random(chances.shape) < chances).astype(np.float64)


def logistic(level: float, keys: Callable[[tuple[int, int], Generator], Array], hardness: float) -> Draw:
    """Keys and examples shift the logit of being right."""

    def draw(number: int, examples: int, rng: Generator) -> Array:
        shifts = keys((number, 1), rng) + rng.normal(0, hardness, (1, examples))
        return outcomes(expit(level + shifts), rng)

    return draw


def shared(chance: float, share: float) -> Draw:
    """Keys that differ by accident only: some outcomes are all keys', the others each key's own."""

    def draw(keys: int, examples: int, rng: Generator) -> Array:
        common = outcomes(np.full((1, examples), chance), rng)
        own = outcomes(np.full((keys, examples), chance), rng)
        return np.where(rng.random((keys, examples)) < share, common, own)

    return draw


def by_key(chances: Callable[[tuple[int, int], Generator], Array]) -> Draw:
    """Each key has a chance of its own, the same for all examples."""
    return lambda keys, examples, rng: outcomes(
        np.broadcast_to(chances((keys, 1), rng), (keys, examples)), rng
    )


NORMAL = logistic(0.5, lambda shape, rng: rng.normal(0, 0.8, shape), 1.5)
HEAVY = logistic(1.5, lambda shape, rng: 0.5 * rng.standard_t(3, shape), 1.2)
SKEWED = by_key(lambda shape, rng: 1 - np.minimum(0.03 * rng.lognormal(0, 0.8, shape), 1))
NULLS = {"ordinary": NORMAL, "heavy-tailed": HEAVY, "skewed": SKEWED, "all keys equal": shared(0.97, 0.9)}


def crossed_kinds() -> Iterator[Kind]:
    """Accuracies: right or wrong, key by key and example by example."""
    draws: dict[str, Draw] = {
        "ordinary": NORMAL,
        "keys far apart": by_key(lambda shape, rng: rng.beta(1.72, 1.01, shape)),
        "heavy-tailed (t, 3 degrees)": HEAVY,
        "skewed (lognormal losses)": SKEWED,
        "all keys equal, 97 %": shared(0.97, 0.9),
        "all keys the same, 97 %": shared(0.97, 1.0),
        "chance, keys differ": by_key(lambda shape, rng: rng.normal(0.1, 0.02, shape).clip(0, 1)),
        "chance, keys alike": shared(0.1, 0.0),
        "nearly all right, 99.8 %": shared(0.998, 0.5),
    }
    exact = {
        "keys far apart": 1.72 / 2.73,
        "all keys equal, 97 %": 0.97,
        "all keys the same, 97 %": 0.97,
        "chance, keys differ": 0.1,
        "chance, keys alike": 0.1,
        "nearly all right, 99.8 %": 0.998,
    }
    for name, draw in draws.items():
        truth = exact.get(name)
        yield Kind(name, _score(draw), _truth(draw) if truth is None else truth)


def key_kinds() -> Iterator[Kind]:
    """Areas under the curve and other shares: one number a key."""

    def atoms(shape: int, rng: Generator) -> Array:
        return 1 - np.where(rng.random(shape) < 0.5, 0, rng.exponential(0.01, shape))

    draws: dict[str, tuple[Callable[[int, Generator], Array], float]] = {
        "AUC about 0.6": (lambda n, rng: rng.normal(0.6, 0.1, n).clip(0, 1), 0.6),
        "AUC near 1": (lambda n, rng: rng.beta(30, 1, n), 30 / 31),
        "AUC near 1, heavy-tailed": (
            lambda n, rng: 1 - np.minimum(rng.lognormal(np.log(0.01), 1, n), 1),
            1 - 0.01 * float(np.exp(0.5)),
        ),
        "AUC 1 for half of the keys": (atoms, 0.995),
        "sites found of 6": (lambda n, rng: rng.binomial(6, 0.3, n) / 6, 0.3),
    }
    for name, (draw, truth) in draws.items():

        def estimate(keys: int, _: int, rng: Generator, draw: Callable[..., Array] = draw) -> Estimate | None:
            return estimated(dict(enumerate(draw(keys, rng))))

        yield Kind(name, estimate, truth)


def advantage_kinds() -> Iterator[Kind]:
    """Advantages: attack, scratch and original on the same examples, of which some are hard for all."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for name, level, spread in (("half", 0.8, 0.5), ("nearly all", 2.6, 0.4), ("nothing", -1.0, 0.2)):

        def estimate(
            keys: int, examples: int, rng: Generator, level: float = level, spread: float = spread
        ) -> Estimate | None:
            hard = rng.normal(0, HARD, (1, examples))
            chances = (expit(one + hard) for one in _levels(keys, rng, level, spread))
            return _advantages(*(outcomes(one, rng) for one in chances))

        levels = _levels(MANY // 100, np.random.default_rng(0), level, spread)
        stolen, own, original = (expit(one + HARD * nodes) @ weights / weights.sum() for one in levels)
        yield Kind(f"advantage: {name}", estimate, float(np.mean((stolen - own) / (original - own))))


def _levels(keys: int, rng: Generator, level: float, spread: float) -> tuple[Array, Array, Array]:
    """Logits of being right on an example of the middle: stolen, scratch, original, ``(keys or 1, 1)``."""
    own = -1.0 + rng.normal(0, 0.2, (keys, 1))
    return level + rng.normal(0, spread, (keys, 1)), own, np.full((1, 1), 3.0)


def beyond() -> Iterator[Kind]:
    """What no interval from few keys can know: the bad keys are not in most samples."""

    def switch(shape: tuple[int, int], rng: Generator) -> Array:
        return np.where(rng.random(shape) < 0.05, 0.6, 0.97)

    def exponential(shape: tuple[int, int], rng: Generator) -> Array:
        return -rng.exponential(1.0, shape)

    yield Kind("1 key in 20 goes wrong, 97 to 60 %", _score(by_key(switch)), 0.9515)
    draw = logistic(3.8, exponential, 1.2)
    yield Kind("exponential losses (logit)", _score(draw), _truth(draw))


def recorded(records: Sequence[Record]) -> Iterator[Kind]:
    """Populations of keys and examples that were measured."""
    done = [r for r in records if r.state == "done" and row(r) is not None]
    own = _rows(r for r in done if r.reference == "scratch" and not r.protected)
    original = _rows(r for r in done if r.reference == "floor" and not r.protected)[0]
    groups: dict[str, list[Record]] = {}
    for record in done:
        if record.protected and record.reference != "scratch":
            groups.setdefault(f"{record.attack} on {record.defense}", []).append(record)
    for name, members in groups.items():
        table = _rows(members)
        yield Kind(f"{name}, accuracy", _score(_resampled(table)), float(table.mean()))
        means = own.mean(axis=1)
        gains = (table.mean(axis=1)[:, None] - means) / (original.mean() - means)
        advantages = _resampled_advantages(table, own, original[None])
        yield Kind(f"{name}, advantage", advantages, float(gains.mean()))
        if members[0].detection:
            values = np.array([r.detection.auc for r in members if r.detection])

            def estimate(keys: int, _: int, rng: Generator, values: Array = values) -> Estimate | None:
                return estimated(dict(enumerate(rng.choice(values, keys))))

            yield Kind(f"{name}, AUC", estimate, float(values.mean()))


def _rows(records: Iterable[Record]) -> Array:
    return np.stack([one for one in map(row, records) if one is not None])


def _resampled(table: Array) -> Draw:
    def draw(keys: int, _: int, rng: Generator) -> Array:
        rows = rng.integers(0, table.shape[0], keys)
        return table[rows][:, rng.integers(0, table.shape[1], table.shape[1])]

    return draw


def _resampled_advantages(attack: Array, scratch: Array, original: Array) -> Callable[..., Estimate | None]:
    def estimate(keys: int, _: int, rng: Generator) -> Estimate | None:
        columns = rng.integers(0, attack.shape[1], attack.shape[1])
        stolen = attack[rng.integers(0, len(attack), keys)][:, columns]
        own = scratch[rng.integers(0, len(scratch), keys)][:, columns]
        return _advantages(stolen, own, original[:, columns])

    return estimate


def _advantages(stolen: Array, own: Array, original: Array) -> Estimate | None:
    """As a report makes them; the original is one network."""
    adds = np.stack([gained(a, s, original[0]) for a, s in zip(stolen, own, strict=True)])
    return mean_advantage(dict(enumerate(adds.mean(axis=1))), adds, original - own)


def _record(defense: str, attack: str, key: int, right: Array, reference: str | None = None) -> Record:
    score = {"value": float(right.mean()), "examples": len(right), "outcomes": pack(right[:, None])}
    return Record.model_validate(
        {"cell": f"{defense} {attack} {key}", "victim": "v", "defense": defense, "attack": attack}
        | {"threat": "t", "key": key, "repeat": 0, "protected": defense != "null", "state": "done"}
        | {"reference": reference, "score": score}
    )


def _score(draw: Draw) -> Callable[[int, int, Generator], Estimate | None]:
    def estimate(keys: int, examples: int, rng: Generator) -> Estimate | None:
        table = draw(keys, examples, rng)
        return estimated(dict(enumerate(table.mean(axis=1))), table=table)

    return estimate


def _truth(draw: Draw) -> float:
    """Mean over many keys and many examples."""
    rng = np.random.default_rng(0)
    return float(np.mean([draw(100, 100, rng).mean() for _ in range(MANY // 100)]))


def measured(kind: Kind, keys: int, simulations: int, examples: int) -> Row:
    """Draw one kind of data many times, always the same."""
    rng = np.random.default_rng([zlib.crc32(kind.name.encode()), keys])
    found = [kind.draw(keys, examples, rng) for _ in range(simulations)]
    printed = [one.interval for one in found if one and one.interval]
    if not printed:
        return Row(kind.name, keys, None, None, 0.0)
    hits = [one.low <= kind.truth <= one.high for one in printed]
    width = float(np.median([one.high - one.low for one in printed]))
    return Row(kind.name, keys, float(np.mean(hits)), width, len(printed) / simulations)


def null_experiment(draw: Draw, keys: int, comparisons: int, examples: int) -> float:
    """Share of comparisons of a defense with itself, under another name, that are called significant.

    The examples are the same for both, the keys are not.
    """
    rng = np.random.default_rng(keys)
    called = 0
    for _ in range(comparisons):
        records = [_record("d", "a", key, one) for key, one in enumerate(draw(2 * keys, examples, rng))]
        first, second = records[:keys], records[keys:]
        found = compared(
            {(key, 0): one for key, one in enumerate(first)},
            {(key, 0): one for key, one in enumerate(second)},
        )
        called += found is not None and found[2] is not None and found[2] < LEVEL
    return called / comparisons


def table(rows: Sequence[Row]) -> str:
    """Coverage in % of the printed intervals (median width), and the share printed where it is not all."""
    lines = [["kind of data", *(f"{keys} keys" for keys in KEYS)]]
    for kind in dict.fromkeys(one.kind for one in rows):
        lines.append([kind, *(_cell(one) for one in rows if one.kind == kind)])
    return markdown_table(lines)


def _cell(of: Row) -> str:
    if of.coverage is None or of.printed < FEW:
        return "none printed" if not of.printed else "hardly any printed"
    some = "" if of.printed == 1 else f", {of.printed:.0%} printed"
    return f"{100 * of.coverage:.1f} ({of.width:.2g}{some})"


def main() -> None:
    """Run the study, and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--records", type=Path, nargs="*", default=[], metavar="RUN")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    groups: dict[str, list[Kind]] = {
        "Accuracies, keys and examples": list(crossed_kinds()),
        "One number a key": list(key_kinds()),
        "Advantages": list(advantage_kinds()),
        "Beyond what few keys can tell": list(beyond()),
    }
    for folder in asked.records:
        with Store(folder / "run.sqlite", create=False) as store:
            groups[f"Drawn from {folder.name}"] = list(recorded(store.records()))
    everything = []
    for title, kinds in groups.items():
        rows = [measured(kind, keys, asked.simulations, asked.examples) for kind in kinds for keys in KEYS]
        everything += rows
        print(f"**{title}**\n\n{table(rows)}\n", flush=True)
    lines = [["a defense against itself, called different", *(f"{keys} keys" for keys in KEYS)]]
    for name, draw in NULLS.items():
        comparisons = min(asked.simulations, NULL)
        shares = [null_experiment(draw, keys, comparisons, asked.examples) for keys in KEYS]
        lines.append([name, *(f"{100 * share:.1f} %" for share in shares)])
    print(f"**The null experiment**\n\n{markdown_table(lines)}")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in everything]), encoding="utf-8")


if __name__ == "__main__":
    main()
