"""Replies on the wire to the types that callers see.

Owns that direction only; `requests.py` owns the other. Pure functions, any thread.
"""

from collections.abc import Iterable
from datetime import UTC, datetime

from google.protobuf.message import Message as WireMessage
from google.protobuf.timestamp_pb2 import Timestamp
from heedful_proto.v1 import inference_pb2 as pb

from heedful.types import (
    Completion,
    FinishReason,
    Generation,
    Score,
    ServedBy,
    Tokenization,
    TokenLogprob,
    TopLogprob,
    Usage,
)

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


def generation_from_wire(response: pb.GenerateResponse) -> Generation:
    """Returns the completions of a unary reply."""
    return Generation(
        completions=tuple(completion_from_wire(item) for item in response.completions),
        served_by=served_by_from_wire(response.served_by),
        usage=usage_from_wire(response.usage),
    )


def completion_from_wire(wire: pb.Completion) -> Completion:
    """Returns one whole completion."""
    return Completion(
        text=wire.text,
        token_ids=tuple(wire.token_ids),
        index=wire.index,
        completion_id=wire.completion_id,
        completion_token=wire.completion_token,
        rateable=wire.rateable,
        finish_reason=finish_reason_from_wire(wire.finish_reason),
        stop=wire.stop,
        logprobs=logprobs_from_wire(wire.logprobs),
        usage=usage_from_wire(wire.usage),
        reward=wire.reward if wire.HasField("reward") else None,
    )


def finish_reason_from_wire(wire: pb.FinishReason.ValueType) -> FinishReason | None:
    """Returns why a completion ended; None while it goes on."""
    return _FINISH_REASONS.get(wire)


def served_by_from_wire(wire: pb.ServedBy) -> ServedBy:
    """Returns what answered."""
    return ServedBy(
        policy_version=wire.policy_version,
        base_model=wire.base_model,
        quantization=wire.quantization,
        seed=wire.seed,
        request_id=wire.request_id,
    )


def usage_from_wire(wire: pb.Usage) -> Usage:
    """Returns counts of tokens."""
    return Usage(wire.prompt_tokens, wire.cached_prompt_tokens, wire.completion_tokens)


def logprobs_from_wire(wire: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    """Returns log-probs by position."""
    return tuple(
        TokenLogprob(
            token_id=item.token_id,
            logprob=item.logprob,
            sampling_logprob=item.sampling_logprob,
            kept_mass=item.kept_mass,
            token=item.token,
            top=tuple(TopLogprob(top.token_id, top.logprob, top.token) for top in item.top),
        )
        for item in wire
    )


def time_from_wire(message: WireMessage, name: str) -> datetime | None:
    """Returns the time in field `name` (UTC), None where it is not set."""
    if not message.HasField(name):
        return None
    stamp = getattr(message, name)
    assert isinstance(stamp, Timestamp)
    return stamp.ToDatetime(UTC)


def scores_from_wire(response: pb.ScoreResponse) -> tuple[Score, ...]:
    """Returns scores in the order of the items."""
    return tuple(
        Score(
            token_ids=tuple(item.token_ids),
            logprobs=tuple(item.logprobs),
            total_logprob=item.total_logprob,
            policy_version=response.policy_version,
            reward=item.reward if item.HasField("reward") else None,
        )
        for item in response.scores
    )


def tokenization_from_wire(response: pb.TokenizeResponse) -> Tokenization:
    """Returns token ids of a text."""
    return Tokenization(
        token_ids=tuple(response.token_ids),
        tokens=tuple(response.tokens),
        rendered=response.rendered,
        context_tokens=response.context_tokens,
    )
