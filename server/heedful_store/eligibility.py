"""Which feedback may be learned from, and why not.

Owns the rule, as one pure function of an event, the answers it is about, the project's profile
and what its rater contributed before. It reads nothing; ``fates`` gathers its arguments. The caps
are absolute numbers per rater: at 2 000 pairs, ten poisoned ones suffice for a backdoor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from heedful_store.judgements import Retraction
from heedful_store.records import Completion, FeedbackEvent, StoredFeedback

Profile = Literal["personal", "team", "public"]
Tier = Literal["anonymous", "user", "expert", "operator"]
Standing = Literal["current", "superseded", "retracted"]
Reason = Literal[
    "erased",  # the rater, or the person who was answered, was erased
    "retraction",  # takes back something else; says nothing itself
    "pending",  # its answer is not visible yet
    "dead",  # its answer never appeared
    "retracted",  # taken back
    "superseded",  # edited, or replaced by a later judgement of the same rater
    "judge",  # given by a model: a model must not score itself
    "no_consent",  # the rater or the person who was answered did not agree
    "content_removed",  # the answer is gone, by retention or on request
    "unknown_rater",  # quarantined: nobody vouches for this rater
    "too_few_raters",  # the project has not yet enough different people
    "prompt_cap",  # this rater has judged this prompt often enough
    "rater_cap",  # this rater has contributed as much as one may
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one ordinary rater may contribute to a project."""

    per_prompt: int  # events on one prompt
    least: int  # events in the whole log that are always allowed
    share: float  # of all current events, where that is more
    min_raters: int  # different named raters before anything is trainable


LIMITS: dict[Profile, Limits | None] = {
    "personal": None,
    "team": Limits(per_prompt=4, least=200, share=0.5, min_raters=1),
    "public": Limits(per_prompt=2, least=2, share=0.001, min_raters=5),
}
# Experts are chosen by the project; operators answer for it and are not capped.
_EXPERT_FACTOR = 10


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in the project's log around one event."""

    on_prompt: int = 0  # trainable events of this rater on this prompt before it
    by_rater: int = 0  # trainable events of this rater before it
    events: int = 0  # current events of the project
    raters: int = 0  # different named raters of the project


@dataclass(frozen=True, slots=True)
class RunUse:
    """One training run that read an event."""

    run_id: str  # the run
    dataset_id: str | None  # content hash of its snapshot
    split: str  # train, validation, calibration, gate or excluded
    policy_version: str | None  # what the run published
    promoted_at_ms: int | None  # when that first became champion


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one event."""

    trainable: bool  # may be learned from now
    reason: Reason | None  # why not
    tier: Tier  # how far its rater is trusted
    uses: tuple[RunUse, ...] = ()  # what was already made of it


def tier_of(event: FeedbackEvent, profile: Profile) -> Tier:
    """Return how far a rater is trusted; alone on one's own machine everybody is an operator."""
    if profile == "personal" or event.rater_kind == "operator":
        return "operator"
    if not event.rater_id:
        return "anonymous"
    return "expert" if event.rater_kind == "expert" else "user"


def fate_of(
    stored: StoredFeedback,
    standing: Standing,
    answers: Sequence[Completion],
    profile: Profile,
    counts: Counts,
) -> Fate:
    """Decide over one event; the first reason that applies is the one given.

    Args:
        stored: The event.
        standing: Whether later events took it back or replaced it.
        answers: Every answer that it is about and that is still logged.
        profile: Of the project.
        counts: Of the log around it.
    """
    event = stored.event
    if event is None:
        return Fate(False, "erased", "anonymous")
    tier = tier_of(event, profile)
    reason = (
        _log_reason(stored, event, standing)
        or _consent_reason(event, answers)
        or _rater_reason(tier, LIMITS[profile], counts)
    )
    return Fate(reason is None, reason, tier)


def _log_reason(stored: StoredFeedback, event: FeedbackEvent, standing: Standing) -> Reason | None:
    if isinstance(event.judgement, Retraction):
        return "retraction"
    if stored.state == "pending":
        return "pending"
    if stored.state == "dead":
        return "dead"
    if standing != "current":
        return standing
    return "judge" if event.rater_kind == "judge" else None


def _consent_reason(event: FeedbackEvent, answers: Sequence[Completion]) -> Reason | None:
    if not event.consent_train or not all(answer.consent.train for answer in answers):
        erased = any(answer.erased_at_ms is not None for answer in answers)
        return "erased" if erased else "no_consent"
    if any(answer.consent.log != "full" for answer in answers):
        return "no_consent"
    if not answers or any(answer.payload is None for answer in answers):
        return "content_removed"
    return None


def _rater_reason(tier: Tier, limits: Limits | None, counts: Counts) -> Reason | None:
    if limits is None or tier == "operator":
        return None
    if tier == "anonymous":
        return "unknown_rater"
    if counts.raters < limits.min_raters:
        return "too_few_raters"
    factor = _EXPERT_FACTOR if tier == "expert" else 1
    if counts.on_prompt >= limits.per_prompt * factor:
        return "prompt_cap"
    if counts.by_rater >= max(limits.least, int(limits.share * counts.events)) * factor:
        return "rater_cap"
    return None
