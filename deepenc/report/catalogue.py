"""Which plugins there are, as a Markdown table; the pages in docs/ hold its output."""

from __future__ import annotations

from typing import Any

from deepenc.arena.battery import Battery
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
    said += [f"of the task: {', '.join(sorted(needs.offers))}"] if needs.offers else []
    return ", ".join(said) or "nothing"


def batteries() -> str:
    """Every battery: its threat models, and for each attack its budgets and what it is in it for."""
    return "\n".join(_battery(get("battery", name)) for name in names("battery"))


def _battery(battery: Battery) -> str:
    threats = [["threat model", "what the attacker has"]]
    for threat in battery.threats:
        given = threat.model_dump(exclude={"name"}, exclude_defaults=True)
        threats.append([f"`{threat.name}`", ", ".join(f"{name} {value}" for name, value in given.items())])
    attacks = [["attack", "with", "under", "why"]]
    for entry in battery.attacks:
        own = entry.attack.spec()
        usual = type(entry.attack)().spec()
        changed = {name: value for name, value in own.items() if value != usual[name] or name == "name"}
        attacks.append(
            [
                f"`{entry.label}`",
                ", ".join(_setting(name, value) for name, value in changed.items()),
                ", ".join(entry.threats or ("all",)),
                battery.why.get(entry.label, ""),
            ]
        )
    tables = (markdown_table(rows) for rows in (threats, attacks))
    return "\n\n".join([f"**{battery.name}**. {battery.summary}", *tables]) + "\n"


def _setting(name: str, value: Any) -> str:
    if name == "name":
        return f"`{value}`"
    if isinstance(value, dict):
        return f"{name} {value.get('name', value)}"
    if isinstance(value, list):
        return f"{name} " + ", ".join(str(v.get("name", v)) if isinstance(v, dict) else str(v) for v in value)
    return f"{name} {value}"


def plugins(kind: str) -> str:
    """A table of all registered plugins of a kind: name and what it does."""
    rows = [[kind, "what it does"]]
    for name in names(kind):
        found = get(kind, name)
        summary = found.summary() if callable(found.summary) else found.summary
        rows.append([f"`{name}`", summary])
    return markdown_table(rows) + "\n"
