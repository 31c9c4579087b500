"""Replies about feedback on the wire to the types that callers see.

Owns that direction only; `feedback_requests.py` owns the other. Pure functions, any thread.
"""

from collections.abc import Iterable
from typing import Literal

import grpc
from google.protobuf.json_format import MessageToDict
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2

from heedful.errors import HeedfulError, error_from_code
from heedful.feedback_requests import LABEL_FLAGS
from heedful.feedback_types import (
    Approval,
    Candidate,
    Comparison,
    Correction,
    Critique,
    Erasure,
    Event,
    ExportedFeedback,
    Fate,
    FateKind,
    FeedbackRecord,
    FeedbackSummary,
    Judgement,
    Label,
    LoggedCompletion,
    OpenQuestion,
    Ranking,
    RaterKind,
    Rating,
    ReasonCount,
    Receipt,
    ReceiptStatus,
    Thumb,
    WorstPrompt,
)
from heedful.replies import (
    completion_from_wire,
    finish_reason_from_wire,
    served_by_from_wire,
    time_from_wire,
)
from heedful.types import Consent, Message

_STATUSES = {
    pb.RECEIPT_STATUS_STORED: ReceiptStatus.STORED,
    pb.RECEIPT_STATUS_DUPLICATE: ReceiptStatus.DUPLICATE,
    pb.RECEIPT_STATUS_PENDING: ReceiptStatus.PENDING,
}
_FATES = {
    pb.FATE_KIND_WAITING: FateKind.WAITING,
    pb.FATE_KIND_USED: FateKind.USED,
    pb.FATE_KIND_EXCLUDED: FateKind.EXCLUDED,
    pb.FATE_KIND_SUPERSEDED: FateKind.SUPERSEDED,
    pb.FATE_KIND_RETRACTED: FateKind.RETRACTED,
    pb.FATE_KIND_PENDING: FateKind.PENDING,
    pb.FATE_KIND_ERASED: FateKind.ERASED,
}
_RATER_KINDS: dict[int, RaterKind] = {
    pb.RATER_KIND_END_USER: "end_user",
    pb.RATER_KIND_EXPERT: "expert",
    pb.RATER_KIND_OPERATOR: "operator",
    pb.RATER_KIND_JUDGE: "judge",
}
_TRAIN = {inference_pb2.TRAIN_CONSENT_NO: False, inference_pb2.TRAIN_CONSENT_YES: True}
_LOG: dict[int, Literal["none", "metadata", "full"]] = {
    inference_pb2.LOG_CONSENT_NONE: "none",
    inference_pb2.LOG_CONSENT_METADATA: "metadata",
    inference_pb2.LOG_CONSENT_FULL: "full",
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def receipt_from_wire(wire: pb.Receipt, token: str = "") -> Receipt:
    """Returns a receipt, carrying the token of what was judged."""
    return Receipt(
        feedback_id=wire.feedback_id,
        seq=wire.seq,
        status=_STATUSES.get(wire.status, ReceiptStatus.STORED),
        server_time=time_from_wire(wire, "server_time"),
        token=token,
    )


def outcome_from_wire(wire: pb.BatchItem, token: str = "") -> Receipt | HeedfulError:
    """Returns what became of one item of a batch: its receipt, or why it was refused."""
    if wire.HasField("receipt"):
        return receipt_from_wire(wire.receipt, token)
    code = _CODES.get(wire.error.code, grpc.StatusCode.UNKNOWN)
    return error_from_code(code, wire.error.message, wire.error.field)


def comparison_from_wire(wire: pb.Comparison) -> Comparison:
    """Returns a blind comparison."""
    return Comparison(
        comparison_id=wire.comparison_id,
        comparison_token=wire.comparison_token,
        candidates=tuple(
            Candidate(
                completion_id=item.completion_id,
                completion_token=item.completion_token,
                text=item.text,
                finish_reason=finish_reason_from_wire(item.finish_reason),
            )
            for item in wire.candidates
        ),
        prompt_text=wire.prompt_text,
        prompt_messages=tuple(Message(item.role, item.content) for item in wire.prompt_messages),
    )


def question_from_wire(response: pb.NextQuestionResponse) -> OpenQuestion:
    """Returns an open comparison, if there is one."""
    found = response.HasField("comparison")
    comparison = comparison_from_wire(response.comparison) if found else None
    return OpenQuestion(comparison, response.open_count)


def record_from_wire(wire: pb.FeedbackRecord) -> FeedbackRecord:
    """Returns a judgement as the log holds it."""
    return FeedbackRecord(
        event=event_from_wire(wire.event),
        receipt=receipt_from_wire(wire.receipt),
        fate=Fate(
            kind=_FATES.get(wire.fate.kind, FateKind.UNKNOWN),
            reason=wire.fate.reason,
            dataset_ids=tuple(wire.fate.dataset_ids),
            trained_versions=tuple(wire.fate.trained_versions),
            promoted=time_from_wire(wire.fate, "promote_time"),
        ),
        current=wire.current,
        policy_version=wire.policy_version,
        retracts_id=wire.retracts_id,
    )


def event_from_wire(wire: pb.FeedbackEvent) -> Event:
    """Returns what a client said; `judgement` is None for retractions and erased events."""
    return Event(
        judgement=_judgement_from_wire(wire),
        completion_id=wire.completion_id,
        completion_token=wire.completion_token,
        comparison_id=wire.comparison_id,
        comparison_token=wire.comparison_token,
        feedback_id=wire.feedback_id,
        supersedes_id=wire.supersedes_id,
        rater_id=wire.rater_id,
        rater_kind=_RATER_KINDS.get(wire.rater_kind),
        tags=tuple(wire.tags),
        train=_TRAIN.get(wire.train),
        client_time=time_from_wire(wire, "client_time"),
    )


def exported_from_wire(wire: pb.ExportFeedbackResponse) -> ExportedFeedback:
    """Returns one event of an export."""
    completions = tuple(logged_completion_from_wire(item) for item in wire.completions)
    return ExportedFeedback(record_from_wire(wire.record), completions)


def logged_completion_from_wire(wire: inference_pb2.LoggedCompletion) -> LoggedCompletion:
    """Returns a completion as it was logged."""
    sampling = MessageToDict(wire.sampling, preserving_proto_field_name=True)
    if wire.sampling.HasField("seed"):
        # JSON has no 64-bit integers, so the conversion above wrote a string.
        sampling["seed"] = wire.sampling.seed
    log = _LOG.get(wire.consent.log)
    return LoggedCompletion(
        completion=completion_from_wire(wire.completion),
        served_by=served_by_from_wire(wire.served_by),
        prompt_text=wire.prompt_text,
        prompt_token_ids=tuple(wire.prompt_token_ids),
        sampling=sampling,
        consent=Consent(log, _TRAIN.get(wire.consent.train)),
        created=time_from_wire(wire, "create_time"),
        end_user=wire.end_user,
        conversation_id=wire.conversation_id,
        tags=tuple(wire.tags),
        duration_s=wire.duration.ToTimedelta().total_seconds(),
    )


def erasure_from_wire(wire: pb.EraseUserResponse) -> Erasure:
    """Returns what an erasure removed."""
    return Erasure(wire.completions, wire.feedback_events, tuple(wire.tainted_versions))


def summary_from_wire(wire: pb.SummarizeFeedbackResponse) -> FeedbackSummary:
    """Returns the log for people."""
    return FeedbackSummary(
        events_by_kind=dict(sorted(wire.events_by_kind.items())),
        by_version=_approvals(wire.by_version),
        by_tag=_approvals(wire.by_tag),
        by_week=_approvals(wire.by_week),
        top_reasons=tuple(ReasonCount(item.reason, item.count) for item in wire.top_reasons),
        worst_prompts=tuple(
            WorstPrompt(item.prompt, item.up, item.down) for item in wire.worst_prompts
        ),
        rater_agreement=wire.rater_agreement if wire.HasField("rater_agreement") else None,
        rater_agreement_pairs=wire.rater_agreement_pairs,
        backlog=wire.backlog,
    )


def _judgement_from_wire(wire: pb.FeedbackEvent) -> Judgement | None:
    match wire.WhichOneof("kind"):
        case "thumb":
            return Thumb(wire.thumb.up, tuple(wire.thumb.reasons))
        case "rating":
            return Rating(wire.rating.value)
        case "ranking":
            groups = tuple(tuple(group.completion_ids) for group in wire.ranking.groups)
            return Ranking(groups, wire.ranking.all_bad)
        case "correction":
            return Correction(wire.correction.text)
        case "critique":
            return Critique(wire.critique.text, tuple(wire.critique.aspects))
        case "label":
            judged = {descriptor.name: value for descriptor, value in wire.label.ListFields()}
            return Label(**{name: judged.get(name) for name in LABEL_FLAGS})
        case _:
            return None


def _approvals(wires: Iterable[pb.Approval]) -> tuple[Approval, ...]:
    return tuple(
        Approval(item.key, item.up, item.down, item.share, item.low, item.high) for item in wires
    )
