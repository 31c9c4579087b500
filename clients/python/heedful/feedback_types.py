"""What people say about completions, and what becomes of it: plain frozen dataclasses.

Owns the vocabulary of feedback that callers see; `types.py` owns that of completions. Knows neither
gRPC nor how values travel. Pure, any thread.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypeAlias, TypedDict

from heedful.types import (
    Completion,
    Consent,
    FinishReason,
    Message,
    Prompt,
    SamplingOptions,
    ServedBy,
)

RaterKind: TypeAlias = Literal["end_user", "expert", "operator", "judge"]
FeedbackKind: TypeAlias = Literal["thumb", "rating", "ranking", "correction", "critique", "label"]


@dataclass(frozen=True, slots=True)
class Thumb:
    """A thumb up or down, with short reasons such as "too long"."""

    up: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rating:
    """A grade from 1 (worst) to 7 (best)."""

    value: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """Completion ids, best group first; those in one group are tied. `all_bad`: none will do."""

    groups: tuple[tuple[str, ...], ...]
    all_bad: bool = False


@dataclass(frozen=True, slots=True)
class Correction:
    """What the completion should have been."""

    text: str


@dataclass(frozen=True, slots=True)
class Critique:
    """What is wrong or right, in words, with short aspects such as "tone"."""

    text: str
    aspects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Label:
    """InstructGPT's metadata flags; None means not judged."""

    fails_instruction: bool | None = None
    inappropriate: bool | None = None
    hallucination: bool | None = None
    satisfies_constraint: bool | None = None
    sexual_content: bool | None = None
    violent_content: bool | None = None
    encourages_harm: bool | None = None
    denigrates_protected_class: bool | None = None
    harmful_advice: bool | None = None
    expresses_opinion: bool | None = None
    expresses_moral_judgment: bool | None = None


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The completion was written by a person, to be imitated (imports only)."""


Judgement: TypeAlias = Thumb | Rating | Ranking | Correction | Critique | Label

_KINDS: dict[type[Judgement], FeedbackKind] = {
    Thumb: "thumb",
    Rating: "rating",
    Ranking: "ranking",
    Correction: "correction",
    Critique: "critique",
    Label: "label",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer of a blind comparison; its token is not shown by `repr`."""

    completion_id: str
    text: str
    completion_token: str = field(default="", repr=False)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers in the order to show them in; which version gave which is withheld until the vote."""

    comparison_id: str
    candidates: tuple[Candidate, ...]
    comparison_token: str = field(default="", repr=False)
    prompt_text: str = ""
    prompt_messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A comparison nobody has voted on, None where there is none, and how many are open."""

    comparison: Comparison | None
    open_count: int


Judged: TypeAlias = Completion | Candidate | str
"""What feedback is about: a completion, a candidate, or a completion's id."""

Placed: TypeAlias = Judged | int
"""One completion in an order; an int is its position among those that were shown."""


@dataclass(frozen=True, slots=True)
class Event:
    """One judgement for a batch, or as the log holds it (then without tokens).

    Where `feedback_id` is empty, `submit` makes one.
    """

    judgement: Judgement | None
    completion_id: str = ""
    completion_token: str = field(default="", repr=False)
    comparison_id: str = ""
    comparison_token: str = field(default="", repr=False)
    feedback_id: str = ""
    supersedes_id: str = ""
    rater_id: str = ""
    rater_kind: RaterKind | None = None
    tags: tuple[str, ...] = ()
    train: bool | None = None
    client_time: datetime | None = None

    @property
    def kind(self) -> FeedbackKind | None:
        """Which kind of judgement it is; None for retractions and what was erased."""
        return _KINDS[type(self.judgement)] if self.judgement is not None else None


class ReceiptStatus(StrEnum):
    """What happened to a submission; each of them means that it is durable."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    """Stored before under the same id, as after a retry."""
    PENDING = "pending"
    """Held until its completion is visible."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a judgement is durable; `seq` grows in the order of the log.

    Carries the token of what was judged, so that `retract` and `feedback` need nothing else.
    """

    feedback_id: str
    seq: int
    status: ReceiptStatus
    server_time: datetime | None = None
    token: str = field(default="", repr=False)


class FateKind(StrEnum):
    """What became of a judgement."""

    UNKNOWN = "unknown"
    WAITING = "waiting"
    """For the next refresh."""
    USED = "used"
    EXCLUDED = "excluded"
    SUPERSEDED = "superseded"
    RETRACTED = "retracted"
    PENDING = "pending"
    """Its completion is not visible yet."""
    ERASED = "erased"


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a judgement, why, and which versions learned from it."""

    kind: FateKind
    reason: str = ""
    dataset_ids: tuple[str, ...] = ()
    trained_versions: tuple[str, ...] = ()
    promoted: datetime | None = None


@dataclass(frozen=True, slots=True)
class FeedbackRecord:
    """A judgement as the log holds it; `retracts_id` is set where it is a retraction."""

    event: Event
    receipt: Receipt
    fate: Fate
    current: bool
    policy_version: str = ""
    retracts_id: str = ""


@dataclass(frozen=True, slots=True)
class LoggedCompletion:
    """A completion as it was logged; `sampling` names only what was set."""

    completion: Completion
    served_by: ServedBy
    prompt_text: str = ""
    prompt_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    consent: Consent = field(default_factory=Consent)
    created: datetime | None = None
    end_user: str = ""
    conversation_id: str = ""
    tags: tuple[str, ...] = ()
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExportedFeedback:
    """One event of an export, with the completions it judges where asked for."""

    record: FeedbackRecord
    completions: tuple[LoggedCompletion, ...] = ()


@dataclass(frozen=True, slots=True)
class ImportItem:
    """One record of existing data: a prompt, its completions and what is said about them.

    `judgement` is an order of positions in `completions` (best group first, ties in one group), or
    a `Thumb` on or the `Demonstration` of the only completion.
    """

    import_id: str
    prompt: Prompt
    completions: tuple[str, ...]
    judgement: tuple[tuple[int, ...], ...] | Thumb | Demonstration
    rater_id: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Erasure:
    """How much lost its content, and which policy versions had learned from it."""

    completions: int
    feedback_events: int
    tainted_versions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Approval:
    """Thumbs of one version, tag or week; `share` is of up, with its 95 % interval."""

    key: str
    up: int
    down: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ReasonCount:
    """How often a reason was given."""

    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class WorstPrompt:
    """A prompt that was judged badly, shortened."""

    prompt: str
    up: int
    down: int


@dataclass(frozen=True, slots=True)
class FeedbackSummary:
    """The log for people; `rater_agreement` is None where no two raters judged the same."""

    events_by_kind: Mapping[str, int]
    by_version: tuple[Approval, ...]
    by_tag: tuple[Approval, ...]
    by_week: tuple[Approval, ...]
    top_reasons: tuple[ReasonCount, ...]
    worst_prompts: tuple[WorstPrompt, ...]
    rater_agreement: float | None
    rater_agreement_pairs: int
    backlog: int


class FeedbackOptions(TypedDict, total=False):
    """Options of every call that records a judgement; None or absent means the default."""

    feedback_id: str | None
    """UUIDv7 under which a repeated call is recognised; default: a new one."""
    supersedes: "str | Receipt | None"
    """The judgement that this one replaces."""
    rater_id: str | None
    """The app's id of the person who judges; default: the completion's end user."""
    rater_kind: RaterKind | None
    """Who judges; default "end_user"."""
    tags: Sequence[str] | None
    """For summaries by tag."""
    train: bool | None
    """False keeps it from being trained on; it can only narrow the completion's consent."""
    client_time: datetime | None
    """When it happened; default: now. Kept, never used for ordering."""
    token: str | None
    """Completion or comparison token, where an id alone is given."""
    timeout_s: float | None
    """Seconds for the call with its retries; default: the client's; `math.inf`: no limit."""


class LabelOptions(FeedbackOptions, total=False):
    """The flags of `label` (see `Label`) beside the options of every judgement."""

    fails_instruction: bool | None
    inappropriate: bool | None
    hallucination: bool | None
    satisfies_constraint: bool | None
    sexual_content: bool | None
    violent_content: bool | None
    encourages_harm: bool | None
    denigrates_protected_class: bool | None
    harmful_advice: bool | None
    expresses_opinion: bool | None
    expresses_moral_judgment: bool | None


class CompareOptions(SamplingOptions, total=False):
    """Options of `compare`; None or absent means the server's default."""

    models: Sequence[str] | None
    """Aliases or policy versions to draw from; default: the champion."""
    purpose: Literal["learn", "gate"] | None
    """"learn" takes any candidates, "gate" judges two policies; default "learn"."""
    priority: Literal["interactive", "background"] | None
    """How the request is scheduled; default "interactive"."""
    end_user: str | None
    """The app's id of its end user."""
    conversation_id: str | None
    """The app's id of the conversation."""
    tags: Sequence[str] | None
    """For summaries by tag."""
    consent: Consent | None
    """What may be done with it."""
    timeout_s: float | None
    """Seconds for the call with its retries; default: the client's; `math.inf`: no limit."""


class FeedbackFilter(TypedDict, total=False):
    """Which judgements to list or export; every field narrows."""

    completion_id: str | None
    comparison_id: str | None
    rater_id: str | None
    policy_version: str | None
    """Of the judged completions."""
    tag: str | None
    kinds: Sequence[FeedbackKind] | None
    """Any of these."""
    current_only: bool | None
    """Leaves out what was replaced or withdrawn."""
