"""The record of a duel: versioned, typed, immutable. What was not measured is absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deepenc.errors import clean

Reason = Annotated[str, BeforeValidator(lambda text: clean(text) if isinstance(text, str) else text)]
"""Text of limited length that every database and terminal takes."""

Count = Annotated[int, Field(ge=0, lt=2**63)]

State = Literal["planned", "running", "done", "unsupported", "out_of_budget", "failed"]
"""State of a cell."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Score(_Part):
    """What a network is worth at its task, on the judge's examples.

    Attributes:
        measure: Name of the task's primary measure, such as "accuracy".
        value: Its value, in [0, 1]; higher is better.
        examples: Examples judged.
        unreadable: Examples for which the network gave NaN; they count as wrong.
        further: Further measures of the task by name, such as "top-5"; not all are shares.
        outcomes: What became of each example, in the judge's order (`deepenc.arena.outcomes`); None where it
            was not kept.
    """

    measure: str = "accuracy"
    value: float = Field(ge=0, le=1)
    examples: Count = Field(gt=0)
    unreadable: Count = 0
    further: dict[str, float] = {}
    outcomes: str | None = Field(None, repr=False)

    @model_validator(mode="after")
    def _of_the_examples(self) -> Self:
        if self.unreadable > self.examples:
            raise ValueError(f"expected counts of the {self.examples} examples judged, got {self!r}")
        return self


class Detection(_Part):
    """How well the claimed scores separate confusion channels from real ones, over all sites.

    Attributes:
        auc: Area under the ROC curve, over the pairs of a confusion and a real channel of one site, in
            [0, 1]; 0.5 is chance.
        average_precision: In [0, 1]; chance is about the share of confusion channels. Sites are pooled by
            rank, in multiples of their ΔC.
        tpr: True positive rate at 1 % false positives, in [0, 1]; pooled likewise; chance is about 0.01.
        exact_sites: Sites whose ΔC most suspect channels are exactly the confusion channels.
        found: Names of these sites.
        sites: Sites with confusion channels.
        bits_left: log2 of the keys still to be tried by an attacker who tries them in the order that his
            scores suggest; at most ``bits``.
        bits: log2 of all keys.
    """

    auc: float = Field(ge=0, le=1)
    average_precision: float = Field(ge=0, le=1)
    tpr: float = Field(ge=0, le=1)
    exact_sites: int = Field(ge=0)
    found: tuple[str, ...] = ()
    sites: int = Field(ge=1)
    bits_left: float = Field(ge=0)
    bits: float = Field(ge=0)


class Cost(_Part):
    """What the attack spent, as the arena metered it (see `deepenc.arena.threat.Meter`)."""

    samples: Count
    steps: Count
    queries: Count = 0
    trials: Count = 0
    seconds: float = Field(ge=0)


class Provenance(_Part):
    """What made a record. It is no part of a cell's identity, though numbers may differ a little with it.

    Attributes:
        deepenc: Version of the package.
        commit: Of the working copy that it runs from, with ``-dirty`` where that was changed; None elsewhere.
        torch: Version.
        python: Version.
        platform: Operating system.
        processor: Model of the processor.
        device: ``"cpu"``, or the accelerator's name.
        threads: Torch's.
        started: When the duel began, UTC (ISO 8601).
        seconds: Wall time of the whole duel, the judge's part and an encryption made for it included.
    """

    deepenc: str
    commit: str | None = None
    torch: str
    python: str
    platform: str
    processor: str
    device: str
    threads: int = Field(ge=1)
    started: str
    seconds: float = Field(ge=0)


class Record(_Part):
    """The immutable result of a duel.

    Attributes:
        cell: Identity of the cell.
        victim: Name of the victim.
        defense: Name of the defense.
        attack: Label of the attack.
        threat: Name of the threat model.
        key: Index of the key.
        repeat: Index of the attack seed.
        reference: What the attack is a reference for, if anything (see `Attack.reference`).
        protected: Whether the defense inserts anything (the null defense does not).
        state: How the duel ended; never "planned" or "running".
        reason: Why it did not end "done": what is missing, or the traceback.
        score: Of the claimed network, or of what is left after removing the most suspect channels.
        removed: Whether the network that was judged was made by the arena, by that removal.
        detection: How good the claimed scores are.
        cost: What the attack spent.
        held: What the attacker's examples amount to in units of the task that are no examples, such as
            ``{"tokens": 6400}``.
        memory: Measured ΔMem / Mem of the defense.
        key_bits: Entropy of the key.
        secret_bytes: What the owner keeps: the key's content without its fixed part, in bytes, all that is
            withheld included (see `deepenc.encryption.keys.key.secret_bytes`).
        diverged: Whether an optimisation of the attack ran into numbers that are not finite; what it claimed
            is from before.
        provenance: Versions, machine and time; None where no duel was begun.
        unreliable: Why the attack failed its self-test; None where it passed, or none was made.
    """

    version: Literal[1, 2, 3, 4] = 4
    cell: str
    victim: str
    defense: str
    attack: str
    threat: str
    key: int
    repeat: int
    reference: Literal["floor", "scratch"] | None = None
    protected: bool
    state: Literal["done", "unsupported", "out_of_budget", "failed"]
    reason: Reason | None = None
    score: Score | None = None
    removed: bool = False
    detection: Detection | None = None
    cost: Cost | None = None
    held: dict[str, Count] = {}
    memory: float | None = None
    key_bits: float | None = None
    secret_bytes: Count | None = None
    diverged: bool = False
    provenance: Provenance | None = None
    unreliable: Reason | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, data: Any) -> Any:
        """Up to version 3 a record held counts of images classified right."""
        if not isinstance(data, dict) or not isinstance(counts := data.get("accuracy"), dict | None):
            return data
        data = {name: value for name, value in data.items() if name != "accuracy"}
        if counts is not None:
            images = counts["images"]
            fifth = counts.get("top5")
            data["score"] = {
                "value": counts["correct"] / images,
                "examples": images,
                "unreadable": counts.get("unreadable", 0),
                "further": {} if fifth is None else {"top-5": fifth / images},
            }
        return data
