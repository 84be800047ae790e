"""Which plugins there are, as a Markdown table; the pages in docs/ hold its output."""

from __future__ import annotations

from deepenc.arena.case import Attack
from deepenc.arena.threat import Needs
from deepenc.plugins import get, names
from deepenc.report.format import ABSENT, markdown_table


def attacks() -> str:
    """A table of all registered attacks: what each does, what it needs at least, what it promises to see."""
    rows = [["attack", "what it does", "needs", "must see"]]
    for name in names("attack"):
        attack = Attack.build(name)
        rows.append([f"`{name}`", attack.summary(), needed(attack.needs), attack.detects or ABSENT])
    return markdown_table(rows) + "\n"


def needed(needs: Needs) -> str:
    """Needs in words.

    >>> needed(Needs(labelled=2, allocation=True)), needed(Needs(key_fraction=1e-6)), needed(Needs())
    ('ΔC, 2 labelled', 'part of the key', 'nothing')
    """
    words = {
        "allocation": "ΔC",
        "architecture": "the architecture",
        "public_checkpoint": "the public network",
    }
    said = [words[field] for field in words if getattr(needs, field)]
    said += ["part of the key"] if needs.key_fraction else []
    counts = {"labelled": "labelled", "unlabelled": "unlabelled", "releases": "releases", "oracle": "queries"}
    counts["trials"] = "trials"
    said += [f"{getattr(needs, field)} {word}" for field, word in counts.items() if getattr(needs, field)]
    return ", ".join(said) or "nothing"


def plugins(kind: str) -> str:
    """A table of all registered plugins of a kind: name and what it does."""
    rows = [[kind, "what it does"]]
    for name in names(kind):
        found = get(kind, name)
        summary = found.summary() if callable(found.summary) else found.summary
        rows.append([f"`{name}`", summary])
    return markdown_table(rows) + "\n"
