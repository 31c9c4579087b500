"""The rows of the log as values: completions, comparisons, feedback, receipts.

Owns the names and meanings of their fields, for callers on both sides of the store. It knows
neither SQL nor threads. Every class is immutable; times are milliseconds since 1970 (UTC).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from heedful_store.judgements import Judgement

LogConsent = Literal["none", "metadata", "full"]
FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]
Origin = Literal["served", "imported", "human"]
Purpose = Literal["gate", "learn"]
RaterKind = Literal["end_user", "expert", "operator", "judge"]
FeedbackState = Literal["stored", "pending", "dead", "erased"]

DEFAULT_TENANT = "default"
DEFAULT_PROJECT = "default"
SCOPE_NAME_RULE = "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
_SCOPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_scope_name(name: str) -> bool:
    """Return whether a tenant or a project may be called so: both are parts of paths."""
    return _SCOPE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Scope:
    """One app of one tenant; nothing is read or written across it."""

    tenant: str = DEFAULT_TENANT
    project: str = DEFAULT_PROJECT


@dataclass(frozen=True, slots=True)
class Consent:
    """What the user agreed to for one answer."""

    log: LogConsent = "full"  # "none" is never stored at all
    train: bool = True  # may be learned from


@dataclass(frozen=True, slots=True)
class CompletionPayload:
    """The content of one answer; removed by erasure and retention, while the row stays.

    The three float sequences have one value per completion token, in nats (kept mass in 0..1).
    """

    prompt_ids: Sequence[int]  # token ids of the rendered prompt
    completion_ids: Sequence[int]  # sampled token ids, never re-tokenised
    prompt_text: str = ""  # rendered prompt
    completion_text: str = ""  # detokenised answer
    messages: str | None = None  # the chat as JSON, to move feedback to another base model
    logprobs: Sequence[float] = ()  # behaviour log-prob under the full softmax at T = 1
    sampling_logprobs: Sequence[float] = ()  # under the truncated, renormalised distribution
    kept_mass: Sequence[float] = ()  # probability that truncation kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer that was given, with all that learning from it needs."""

    completion_id: str  # UUIDv7
    scope: Scope  # owner
    policy_version: str  # which policy sampled it
    created_at_ms: int  # server clock
    end_user: str = ""  # who asked; empty when unknown
    conversation_id: str = ""  # groups the turns of one talk
    request_id: str = ""  # the call that made it
    sample_idx: int = 0  # which of the call's n samples
    origin: Origin = "served"  # served by us, imported, or written by a person
    policy_hash: str = ""  # content hash of the adapter
    base_id: str = ""  # base model and tokenizer
    template_hash: str = ""  # chat template
    quantization: str = ""  # weight layout, e.g. "nf4"
    kernel_path: str = ""  # which kernels ran, e.g. "cpu-native"
    sampling: Mapping[str, object] = field(default_factory=dict)  # temperature, top_p, …
    seed: int | None = None  # signed 64-bit
    finish_reason: FinishReason = "stop"  # why it ended
    prompt_tokens: int = 0  # length of the prompt
    completion_tokens: int = 0  # length of the answer
    consent: Consent = field(default_factory=Consent)  # what may be kept and learned
    tags: tuple[str, ...] = ()  # the app's own labels
    prompt_hash: str = ""  # SHA-256 of the prompt ids; set on append, only with consent "full"
    payload: CompletionPayload | None = None  # None: metadata only, not asked for, or removed
    erased_at_ms: int | None = None  # set when the user was erased


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer of a comparison."""

    completion_id: str  # its row among the completions
    policy_version: str  # withheld from the rater until the vote
    position: int  # place on the screen, from 0
    propensity: float  # probability with which this policy was drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A blind set of answers to one prompt."""

    comparison_id: str  # UUIDv7
    scope: Scope  # owner
    purpose: Purpose  # "gate": policies drawn uniformly, equal sampling; "learn": any
    candidates: tuple[Candidate, ...]  # in the order generated
    created_at_ms: int  # server clock
    end_user: str = ""  # who was asked
    conversation_id: str = ""  # the talk it belongs to
    tags: tuple[str, ...] = ()  # the app's own labels
    voted_at_ms: int | None = None  # first vote; stays set, since versions were revealed then


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackEvent:
    """One judgement as a client sent it. Its target is a completion, a comparison or, for a
    ranking, the completions that it names; a retraction has none.
    """

    feedback_id: str  # the client's UUIDv7: the idempotency key within the scope
    scope: Scope  # owner
    judgement: Judgement  # what was said
    rater_id: str = ""  # who said it; empty is anonymous
    rater_kind: RaterKind = "end_user"  # in which role
    completion_id: str | None = None  # the answer judged
    comparison_id: str | None = None  # the blind set judged
    comment: str | None = None  # free text beside any judgement
    supersedes_id: str | None = None  # the event that this one edits or retracts
    consent_train: bool = True  # may be learned from
    tags: tuple[str, ...] = ()  # the app's own labels
    client_time_ms: int | None = None  # shown only; never used for order, nor in the digest
    source: str = "rpc"  # rpc, http, cli, import; not in the digest
    key_id: str = ""  # API key that wrote it; not in the digest


@dataclass(frozen=True, slots=True)
class Receipt:
    """The store's word that an event is durable; given only after the commit."""

    feedback_id: str  # as sent
    seq: int  # place in the log
    server_time_ms: int  # when it was first accepted
    duplicate: bool  # True: the event was there before, and this call changed nothing
    state: FeedbackState  # "pending" until its target is visible


@dataclass(frozen=True, slots=True)
class StoredFeedback:
    """An event as the log holds it."""

    event: FeedbackEvent | None  # None once an erasure emptied it
    feedback_id: str  # also when the event is gone
    seq: int  # order of acceptance; decides what is current
    log_seq: int | None  # cursor for readers: seq, or later if it waited for its target
    server_time_ms: int  # when it was accepted
    state: FeedbackState  # stored, pending, dead (no target came in time) or erased
    dead_reason: str = ""  # why it was given up


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackFilter:
    """Which events to list; every field narrows."""

    scope: Scope = field(default_factory=Scope)  # owner
    kinds: tuple[str, ...] = ()  # any of these kinds
    rater_id: str | None = None  # this rater's
    end_user: str | None = None  # on answers given to this user
    completion_id: str | None = None  # on this answer, alone or in a ranking
    comparison_id: str | None = None  # on this comparison
    policy_version: str | None = None  # on answers of this policy
    tag: str | None = None  # carrying this tag
    since_ms: int | None = None  # accepted at or after
    until_ms: int | None = None  # accepted before
    current_only: bool = False  # leave out what was edited, replaced or retracted
    states: tuple[FeedbackState, ...] = ("stored", "pending")  # in any of these states
