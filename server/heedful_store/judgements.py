"""What a person can say about an answer: the six kinds of judgement, and the retraction.

Owns their rules and their form in the log: a kind, a JSON value, and free text kept apart so
that an erasure can remove it. It knows neither targets nor raters. Pure, any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, assert_never

from heedful_store.errors import Invalid

Kind = Literal["thumb", "rating", "ranking", "correction", "critique", "label", "retraction"]

# InstructGPT's binary metadata questions about one output.
LABEL_FLAGS = (
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual_content",
    "violent_content",
    "encourages_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgement",
)
RATING_MIN, RATING_MAX = 1, 7


@dataclass(frozen=True, slots=True)
class Thumb:
    """Up or down."""

    up: bool
    reasons: tuple[str, ...] = ()  # short labels such as "too long"


@dataclass(frozen=True, slots=True)
class Rating:
    """Overall quality on the Likert scale."""

    value: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order over several answers; ties share a group."""

    groups: tuple[tuple[str, ...], ...]  # completion ids, best group first
    all_bad: bool = False  # none of them is acceptable


@dataclass(frozen=True, slots=True)
class Correction:
    """The answer as it should have been."""

    text: str


@dataclass(frozen=True, slots=True)
class Critique:
    """What was wrong, in words."""

    text: str
    aspects: tuple[str, ...] = ()  # short labels such as "tone"


@dataclass(frozen=True, slots=True)
class Label:
    """Yes or no to some of LABEL_FLAGS; a flag that is absent was not answered."""

    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Retraction:
    """Takes back the event named by ``supersedes_id`` and every edit of it, for good."""


Judgement = Thumb | Rating | Ranking | Correction | Critique | Label | Retraction


@dataclass(frozen=True, slots=True)
class Encoded:
    """A judgement as it lies in the tables."""

    kind: Kind
    value: str  # JSON, canonical
    text: str | None  # free text, stored in feedback_payloads


# json.dumps with options would build an encoder for every event.
_dumps = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def encode(judgement: Judgement) -> Encoded:
    """Check a judgement and return its stored form; raise Invalid naming the field."""
    match judgement:
        case Thumb(up, reasons):
            return Encoded("thumb", _dumps({"reasons": reasons, "up": up}), None)
        case Rating(value):
            if not RATING_MIN <= value <= RATING_MAX:
                raise Invalid("rating.value", f"must be {RATING_MIN}..{RATING_MAX}, got {value}")
            return Encoded("rating", _dumps({"value": value}), None)
        case Ranking(groups, all_bad):
            _check_groups(groups)
            return Encoded("ranking", _dumps({"all_bad": all_bad, "groups": groups}), None)
        case Correction(text):
            if not text.strip():
                raise Invalid("correction.text", "must not be empty")
            return Encoded("correction", "{}", text)
        case Critique(text, aspects):
            if not text.strip():
                raise Invalid("critique.text", "must not be empty")
            return Encoded("critique", _dumps({"aspects": aspects}), text)
        case Label(flags):
            _check_flags(flags)
            return Encoded("label", _dumps({"flags": dict(flags)}), None)
        case Retraction():
            return Encoded("retraction", "{}", None)
        case _:
            assert_never(judgement)


def decode(kind: Kind, value: str, text: str | None) -> Judgement | None:
    """Return the judgement of a stored row, or None where an erasure emptied it."""
    if not value or (kind in ("correction", "critique") and text is None):
        return None
    fields = json.loads(value)
    match kind:
        case "thumb":
            return Thumb(fields["up"], tuple(fields["reasons"]))
        case "rating":
            return Rating(fields["value"])
        case "ranking":
            return Ranking(tuple(tuple(group) for group in fields["groups"]), fields["all_bad"])
        case "correction":
            return Correction(text or "")
        case "critique":
            return Critique(text or "", tuple(fields["aspects"]))
        case "label":
            return Label(fields["flags"])
        case "retraction":
            return Retraction()
        case _:
            assert_never(kind)


def ranked_ids(judgement: Judgement) -> tuple[str, ...]:
    """Return the completion ids that a ranking names, in its order; empty for other kinds."""
    if not isinstance(judgement, Ranking):
        return ()
    return tuple(completion_id for group in judgement.groups for completion_id in group)


def _check_groups(groups: tuple[tuple[str, ...], ...]) -> None:
    if not all(groups):
        raise Invalid("ranking.groups", "a group must not be empty")
    names = [name for group in groups for name in group]
    if len(names) < 2:
        raise Invalid("ranking.groups", "needs at least two completions")
    if len(set(names)) < len(names):
        raise Invalid("ranking.groups", "names a completion twice")


def _check_flags(flags: Mapping[str, bool]) -> None:
    if not flags:
        raise Invalid("label.flags", "must not be empty")
    for name in flags:
        if name not in LABEL_FLAGS:
            raise Invalid("label.flags", f"unknown flag {name!r}")
