"""How numbers and tables are written, in the terminal, in Markdown and in the catalogue alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from deepenc.arena.estimates.estimate import Estimate, Interval, Method, unseen

ABSENT = "—"
"""Stands where nothing was measured; never 0."""

MARKS: dict[Method, str] = {"crossed": "", "keys": "k", "examples": "e"}
"""How an interval says what it takes into account."""

BEST = {"best": " (best)", "tie": " (≈ best)"}
"""Marks of `deepenc.arena.estimates.comparison.ties`."""

TIES = (
    "Defenses marked ≈ cannot be told from the best by their strongest attacks (p of at least 0.05, Holm "
    "over all pairs)."
)

INTERVAL = (
    "Mean [95 % interval, over keys and the judge's examples; `k`: over keys, these examples only; `e`: over "
    "examples, these keys only]"
)


def percent(value: Estimate | None) -> tuple[str, str]:
    """A share in percent: the mean with its interval, and the owner's worst key."""
    return estimate(value, 100, 1)


def share(value: float) -> str:
    """A further measure: in percent where it is a share, as it is where it is none.

    >>> share(0.781), share(12.34)
    ('78.1', '12.3')
    """
    return f"{100 * value:.1f}" if value <= 1 else f"{value:.3g}"


def unit(value: Estimate | None) -> tuple[str, str]:
    """An advantage: the mean with its interval, and the owner's worst key."""
    return estimate(value, 1, 2)


def estimate(value: Estimate | None, factor: int, digits: int) -> tuple[str, str]:
    """The mean with its interval, and the largest value of a key.

    Args:
        value: What was estimated; None where nothing was.
        factor: All numbers are multiplied by it.
        digits: After the point.
    """
    if value is None:
        return ABSENT, ABSENT

    def text(number: float) -> str:
        return f"{factor * number:.{digits}f}"

    return text(value.mean) + bracket(value, text), text(value.most)


def bracket(value: Estimate, text: Callable[[float], str]) -> str:
    """The interval of an estimate in brackets, a space in front; or why there is none.

    Args:
        value: What was estimated.
        text: Writes one number.
    """
    if value.interval:
        return " " + bounds(value.interval, text)
    return f" [{value.lacks}]" if value.lacks else ""


def bounds(interval: Interval, text: Callable[[float], str]) -> str:
    """Both ends of an interval, and the mark of its method.

    >>> bounds(Interval(0.25, 0.5, "keys"), str)
    '[0.25, 0.5]k'
    """
    return f"[{text(interval.low)}, {text(interval.high)}]{MARKS[interval.method]}"


def owners(keys: Iterable[int]) -> list[str]:
    """What numbers of keys say about the next one, in words; one sentence for each number that occurs.

    >>> owners([5, 5])
    ['Of 5 keys the worst is shown: with 95 % confidence, at most 45 % of all keys are worse than it.']
    """
    return [
        f"Of {number} keys the worst is shown: with 95 % confidence, at most {100 * unseen(number):.0f} % of "
        "all keys are worse than it."
        if number > 1
        else "Of one key next to nothing follows for others: up to 95 % of all keys may be worse."
        for number in sorted(set(keys))
    ]


def count(number: float) -> str:
    """A count in at most five characters.

    >>> count(0), count(950), count(12_800), count(3_000_000)
    ('0', '950', '12.8k', '3M')
    """
    for limit, suffix in ((1_000_000, "M"), (1000, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f}"


def by_frequency(attacks: Mapping[str, int]) -> list[tuple[str, int]]:
    """Attacks and how many keys fell worst to each, the most frequent first."""
    return sorted(attacks.items(), key=lambda item: -item[1])


def with_keys(attacks: Mapping[str, int]) -> str:
    """The attacks by which keys fell worst.

    >>> with_keys({"norms": 1, "gates": 2})
    'gates (2), norms (1)'
    """
    return ", ".join(f"{name} ({keys})" for name, keys in by_frequency(attacks))


def states(counts: Mapping[str, int]) -> str:
    """How many duels ended how.

    >>> states({"out_of_budget": 1, "done": 2})
    '2 done, 1 out of budget'
    """
    return ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in sorted(counts.items()))


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))
