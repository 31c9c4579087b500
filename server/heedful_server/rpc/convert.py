"""What the server answers, as messages of the contract.

Owns the shape of responses. The other direction is validate.py. Pure functions; they know
nothing of calls, and of tokens only what a function that they are given tells them.
"""

from collections.abc import Callable, Sequence

from heedful_proto.v1 import inference_pb2 as pb

from heedful_server.protocol import Finish
from heedful_server.rpc.generation import Generation
from heedful_server.rpc.parts import Part, Served
from heedful_server.rpc.scorer import Scores
from heedful_server.rpc.text_pool import Tokens

TokenText = Callable[[int], str]

FINISH_REASONS: "dict[str, pb.FinishReason.ValueType]" = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "deadline": pb.FINISH_REASON_DEADLINE,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}


def stream_head(generation: Generation) -> pb.GenerateStreamResponse:
    """Return the first message of a stream."""
    entry = generation.entry
    heads = [
        pb.CompletionHead(
            index=index,
            completion_id=completion_id,
            completion_token=token,
            rateable=entry.rateable,
        )
        for index, (completion_id, token) in enumerate(
            zip(generation.completion_ids, entry.tokens, strict=True)
        )
    ]
    head = pb.StreamHead(served_by=served_by(generation.served), completions=heads)
    return pb.GenerateStreamResponse(head=head)


def stream_delta(
    generation: Generation, part: Part, token_text: TokenText
) -> pb.GenerateStreamResponse:
    """Return a message that carries more of one completion."""
    delta = pb.CompletionDelta(index=part.index, text="".join(part.texts), token_ids=part.token_ids)
    if generation.request.logprobs:
        delta.logprobs.extend(_token_logprobs(part, token_text))
    if part.finish is not None:
        delta.finish_reason = FINISH_REASONS[part.finish.reason]
        delta.stop = part.finish.stop
        delta.usage.CopyFrom(_usage(part.finish))
        if generation.entry.rateable and not part.rateable:
            delta.rateable = False
    return pb.GenerateStreamResponse(delta=delta)


def generate_response(
    generation: Generation, parts: Sequence[Part], token_text: TokenText
) -> pb.GenerateResponse:
    """Return the answer to a whole request."""
    with_logprobs = generation.request.logprobs
    ids, tokens = generation.completion_ids, generation.entry.tokens
    completions = [
        _completion(place, part, ids[part.index], tokens[part.index], with_logprobs, token_text)
        for place, part in enumerate(parts)
    ]
    usages = [completion.usage for completion in completions]
    usage = pb.Usage(
        prompt_tokens=max(usage.prompt_tokens for usage in usages),
        cached_prompt_tokens=max(usage.cached_prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
    )
    return pb.GenerateResponse(
        served_by=served_by(generation.served), completions=completions, usage=usage
    )


def score_response(scores: Scores) -> pb.ScoreResponse:
    """Return the scores of items, in their order."""
    items = [
        pb.Score(
            token_ids=item.token_ids,
            logprobs=item.logprobs,
            total_logprob=sum(item.logprobs),
            reward=item.reward,
        )
        for item in scores.items
    ]
    return pb.ScoreResponse(scores=items, policy_version=scores.policy_version)


def tokenize_response(tokens: Tokens, context_tokens: int) -> pb.TokenizeResponse:
    """Return the tokens of a text."""
    return pb.TokenizeResponse(
        token_ids=tokens.token_ids,
        tokens=tokens.texts,
        rendered=tokens.rendered,
        context_tokens=context_tokens,
    )


def _completion(
    index: int,
    part: Part,
    completion_id: str,
    token: str,
    with_logprobs: bool,
    token_text: TokenText,
) -> pb.Completion:
    assert part.finish is not None, "a completion without an end"
    return pb.Completion(
        index=index,
        completion_id=completion_id,
        completion_token=token if part.rateable else "",
        rateable=part.rateable,
        text="".join(part.texts),
        token_ids=part.token_ids,
        logprobs=_token_logprobs(part, token_text) if with_logprobs else (),
        finish_reason=FINISH_REASONS[part.finish.reason],
        stop=part.finish.stop,
        usage=_usage(part.finish),
        reward=part.reward,
    )


def _token_logprobs(part: Part, token_text: TokenText) -> list[pb.TokenLogprob]:
    alternatives = part.top or [[]] * len(part.token_ids)
    columns = zip(
        part.token_ids,
        part.logprobs,
        part.sampling_logprobs,
        part.kept_mass,
        alternatives,
        strict=True,
    )
    return [
        pb.TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            sampling_logprob=sampling_logprob,
            kept_mass=kept_mass,
            top=[
                pb.TopLogprob(token_id=other, logprob=value, token=token_text(other))
                for other, value in top
            ],
            token=token_text(token_id),
        )
        for token_id, logprob, sampling_logprob, kept_mass, top in columns
    ]


def _usage(finish: Finish) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=finish.prompt_tokens,
        cached_prompt_tokens=finish.cached_prompt_tokens,
        completion_tokens=finish.completion_tokens,
    )


def served_by(served: Served) -> pb.ServedBy:
    """Return what answered a request."""
    return pb.ServedBy(
        policy_version=served.policy_version,
        base_model=served.base_model,
        quantization=served.quantization,
        seed=served.seed,
        request_id=served.request_id,
    )
