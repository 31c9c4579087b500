"""What FeedbackService answers, and logged completions, as messages of the contract.

Owns the shape of responses and the words of a fate. The other direction is feedback_rules.py. Pure
functions.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, assert_never

from google.protobuf.timestamp_pb2 import Timestamp
from heedful_proto.v1 import feedback_pb2 as pb
from heedful_proto.v1 import inference_pb2
from heedful_store import (
    Approval,
    Correction,
    Critique,
    ErasureReport,
    FeedbackEvent,
    Invalid,
    Label,
    Ranking,
    Rating,
    Receipt,
    Retraction,
    Summary,
    Thumb,
)

from heedful_server.errors import InvalidRequest
from heedful_server.feedback.comparing import Question
from heedful_server.feedback.desk import Outcome
from heedful_server.feedback.reading import LoggedAnswer, Record
from heedful_server.rpc.convert import FINISH_REASONS
from heedful_server.rpc.feedback_rules import FLAGS, RATER_KINDS
from heedful_server.rpc.status import to_rpc_error

_RATER_KIND_VALUES = {name: value for value, name in RATER_KINDS.items() if value}
_FLAG_NAMES = {stored: name for name, stored in FLAGS.items()}
_LOG_CONSENTS = {
    "none": inference_pb2.LOG_CONSENT_NONE,
    "metadata": inference_pb2.LOG_CONSENT_METADATA,
    "full": inference_pb2.LOG_CONSENT_FULL,
}
_TRAIN_CONSENTS = {
    False: inference_pb2.TRAIN_CONSENT_NO,
    True: inference_pb2.TRAIN_CONSENT_YES,
}
_FATE_KINDS = {
    "erased": pb.FATE_KIND_ERASED,
    "pending": pb.FATE_KIND_PENDING,
    "retracted": pb.FATE_KIND_RETRACTED,
    "superseded": pb.FATE_KIND_SUPERSEDED,
}
# Where the words differ from the reason's name.
_REASONS = {"dead": "completion not logged", "judge": "given by a model"}
_SEED_RANGE = 1 << 64
# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


def receipt(found: Receipt) -> pb.Receipt:
    """Return a receipt."""
    status = pb.RECEIPT_STATUS_STORED
    if found.duplicate:
        status = pb.RECEIPT_STATUS_DUPLICATE
    elif found.state == "pending":
        status = pb.RECEIPT_STATUS_PENDING
    return pb.Receipt(
        feedback_id=found.feedback_id,
        seq=found.seq,
        server_time=timestamp(found.server_time_ms),
        status=status,
    )


def batch_item(outcome: Outcome) -> pb.BatchItem:
    """Return the outcome of one item of a batch."""
    if isinstance(outcome, Receipt):
        return pb.BatchItem(receipt=receipt(outcome))
    failure = to_rpc_error(outcome, "")
    field = outcome.field if isinstance(outcome, InvalidRequest | Invalid) else ""
    code = failure.code.value[0]
    return pb.BatchItem(error=pb.ItemError(code=code, message=failure.message, field=field))


def record(found: Record) -> pb.FeedbackRecord:
    """Return an event with its receipt and its fate."""
    stored = found.stored
    message = pb.FeedbackRecord(
        event=pb.FeedbackEvent(feedback_id=stored.feedback_id),
        receipt=receipt(
            Receipt(stored.feedback_id, stored.seq, stored.server_time_ms, False, stored.state)
        ),
        fate=fate(found),
    )
    event = stored.event
    if event is None:
        return message
    message.event.CopyFrom(_event(event))
    if isinstance(event.judgement, Retraction):
        message.retracts_id = event.supersedes_id or ""
        return message
    message.current = stored.state == "stored" and found.standing == "current"
    if event.completion_id is not None and event.completion_id not in found.blind:
        message.policy_version = found.answers[0].policy_version if found.answers else ""
    return message


def fate(found: Record) -> pb.Fate:
    """Return what became of an event; unspecified where only GetFeedback would know."""
    judged = found.fate
    used = [use for use in judged.uses if use.split != "excluded"]
    message = pb.Fate(
        dataset_ids=[use.dataset_id for use in used if use.dataset_id],
        trained_versions=[use.policy_version for use in used if use.policy_version],
    )
    if promoted := [use.promoted_at_ms for use in used if use.promoted_at_ms is not None]:
        message.promote_time.CopyFrom(timestamp(min(promoted)))
    if judged.reason in _FATE_KINDS:
        message.kind = _FATE_KINDS[judged.reason]
    elif used:
        message.kind = pb.FATE_KIND_USED
    elif judged.reason is not None:
        message.kind = pb.FATE_KIND_EXCLUDED
        message.reason = _REASONS.get(judged.reason, judged.reason.replace("_", " "))
    elif found.fate_is_exact:
        message.kind = pb.FATE_KIND_WAITING
    return message


def logged_completion(answer: LoggedAnswer) -> inference_pb2.LoggedCompletion:
    """Return an answer as it was logged, without what must stay blind."""
    row = answer.completion
    sampling = dict(row.sampling)
    duration_s = sampling.pop("duration_s", 0.0)
    message = inference_pb2.LoggedCompletion(
        completion=_completion(answer, sampling),
        served_by=_served_by(answer),
        sampling=_sampling(sampling),
        consent=inference_pb2.Consent(
            log=_LOG_CONSENTS[row.consent.log], train=_TRAIN_CONSENTS[row.consent.train]
        ),
        create_time=timestamp(row.created_at_ms),
        end_user="" if row.erased_at_ms is not None else row.end_user,
        conversation_id=row.conversation_id,
        tags=row.tags,
    )
    message.duration.FromMicroseconds(round(float(str(duration_s)) * 1e6))
    if row.payload is not None:
        message.prompt_text = row.payload.prompt_text
        message.prompt_token_ids.extend(row.payload.prompt_ids)
    return message


def comparison(question: Question) -> pb.Comparison:
    """Return a blind comparison in the order to show it in."""
    message = pb.Comparison(
        comparison_id=question.comparison_id,
        comparison_token=question.token,
        candidates=[
            pb.Candidate(
                completion_id=shown.completion_id,
                completion_token=shown.token,
                text=shown.text,
                finish_reason=_finish_reason(shown.finish_reason),
            )
            for shown in question.candidates
        ],
        prompt_text=question.prompt_text,
    )
    for turn in json.loads(question.messages) if question.messages else ():
        message.prompt_messages.add(role=turn["role"], content=turn["content"])
    return message


def erasure(report: ErasureReport) -> pb.EraseUserResponse:
    """Return what an erasure did."""
    return pb.EraseUserResponse(
        completions=report.completions,
        feedback_events=report.feedback,
        tainted_versions=[version for _, version in report.tainted_policies],
    )


def summary(found: Summary, backlog: int) -> pb.SummarizeFeedbackResponse:
    """Return the log in numbers."""
    pairs = found.thumb_agreement.pairs + found.ranking_agreement.pairs
    agreeing = found.thumb_agreement.agreeing + found.ranking_agreement.agreeing
    message = pb.SummarizeFeedbackResponse(
        events_by_kind=dict(found.by_kind),
        by_version=_approvals(found.by_policy),
        by_tag=_approvals(found.by_tag),
        by_week=_approvals(found.by_week),
        top_reasons=[pb.ReasonCount(reason=name, count=n) for name, n in found.reasons],
        worst_prompts=[
            pb.WorstPrompt(prompt=item.excerpt, up=item.approval.up, down=item.approval.down)
            for item in found.worst_prompts
        ],
        rater_agreement_pairs=pairs,
        backlog=backlog,
    )
    if pairs:
        message.rater_agreement = agreeing / pairs
    return message


def timestamp(time_ms: int) -> Timestamp:
    """Return a time of the server's clock."""
    return Timestamp(seconds=time_ms // 1000, nanos=time_ms % 1000 * 1_000_000)


def wilson(up: int, down: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; without any votes, all of [0, 1]."""
    total = up + down
    if total == 0:
        return 0.0, 1.0
    share = up / total
    scale = 1 + _Z * _Z / total
    middle = share + _Z * _Z / (2 * total)
    width = _Z * math.sqrt(share * (1 - share) / total + _Z * _Z / (4 * total * total))
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def _event(event: FeedbackEvent) -> pb.FeedbackEvent:
    message = pb.FeedbackEvent(
        feedback_id=event.feedback_id,
        completion_id=event.completion_id or "",
        comparison_id=event.comparison_id or "",
        rater_kind=_RATER_KIND_VALUES[event.rater_kind],  # type: ignore[arg-type] # an enum's int
        rater_id=event.rater_id,
        tags=event.tags,
        train=_TRAIN_CONSENTS[event.consent_train],
    )
    if event.client_time_ms is not None:
        message.client_time.CopyFrom(timestamp(event.client_time_ms))
    if not isinstance(event.judgement, Retraction):
        message.supersedes_id = event.supersedes_id or ""
    _add_judgement(message, event)
    return message


def _add_judgement(message: pb.FeedbackEvent, event: FeedbackEvent) -> None:
    match event.judgement:
        case Thumb(up, reasons):
            message.thumb.CopyFrom(pb.Thumb(up=up, reasons=reasons))
        case Rating(value):
            message.rating.value = value
        case Ranking(groups, all_bad):
            message.ranking.all_bad = all_bad
            for group in groups:
                message.ranking.groups.add(completion_ids=group)
        case Correction(text):
            message.correction.text = text
        case Critique(text, aspects):
            message.critique.CopyFrom(pb.Critique(text=text, aspects=aspects))
        case Label(flags):
            values = {_FLAG_NAMES[name]: value for name, value in flags.items()}
            message.label.CopyFrom(pb.Label(**values))
        case Retraction():
            pass
        case _:
            assert_never(event.judgement)


def _completion(answer: LoggedAnswer, sampling: dict[str, Any]) -> inference_pb2.Completion:
    row = answer.completion
    message = inference_pb2.Completion(
        index=row.sample_idx,
        completion_id=row.completion_id,
        rateable=row.erased_at_ms is None,
        finish_reason=_finish_reason(row.finish_reason),
        stop=sampling.get("stopped_by", ""),
        usage=inference_pb2.Usage(
            prompt_tokens=row.prompt_tokens,
            cached_prompt_tokens=sampling.get("cached_prompt_tokens", 0),
            completion_tokens=row.completion_tokens,
        ),
    )
    payload = row.payload
    if payload is None:
        return message
    message.text = payload.completion_text
    message.token_ids.extend(payload.completion_ids)
    if payload.logprobs and not answer.is_blind:
        columns = (payload.logprobs, payload.sampling_logprobs, payload.kept_mass)
        for token_id, *values in zip(payload.completion_ids, *columns, strict=True):
            logprob, sampling_logprob, kept_mass = values
            message.logprobs.add(
                token_id=token_id,
                logprob=logprob,
                sampling_logprob=sampling_logprob,
                kept_mass=kept_mass,
            )
    return message


def _served_by(answer: LoggedAnswer) -> inference_pb2.ServedBy:
    row = answer.completion
    message = inference_pb2.ServedBy(
        base_model=row.base_id.partition("@")[0],
        quantization=row.quantization,
        request_id=row.request_id,
    )
    if not answer.is_blind:
        message.policy_version = row.policy_version
        message.seed = (row.seed or 0) % _SEED_RANGE
    return message


def _sampling(values: Mapping[str, Any]) -> inference_pb2.SamplingParams:
    """Return the parameters that the row holds; imported and erased answers have none."""
    known = inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    fields = {name: value for name, value in values.items() if name in known}
    fields["logit_bias"] = [
        inference_pb2.LogitBias(token_id=token_id, bias=bias)
        for token_id, bias in values.get("logit_bias", ())
    ]
    return inference_pb2.SamplingParams(**fields)


def _approvals(groups: Mapping[str, Approval]) -> list[pb.Approval]:
    found = []
    for key, approval in sorted(groups.items()):
        low, high = wilson(approval.up, approval.down)
        found.append(
            pb.Approval(
                key=key,
                up=approval.up,
                down=approval.down,
                share=approval.share,
                low=low,
                high=high,
            )
        )
    return found


def _finish_reason(name: str) -> "inference_pb2.FinishReason.ValueType":
    # An answer that an error cut off has no reason of its own in the contract.
    return FINISH_REASONS.get(name, inference_pb2.FINISH_REASON_UNSPECIFIED)
